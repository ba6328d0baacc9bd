//! Fields of the messages that clients are known to send, by number.

use std::{collections::BTreeMap, sync::LazyLock};

/// Type of a field.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Type {
    Text,
    Base64,
    Bool,
    Integer,
    Message(&'static str),
    List(Box<Self>),
    Map(Box<Self>),
}

/// One field of a message.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Field {
    /// Name in JSON.
    pub name: String,
    /// Type.
    pub kind: Type,
    /// A pointer in Go: its zero value is a value.
    pub optional: bool,
}

/// `message: name=number:type …`; `[t]` is a list, `{t}` a map from strings, `?` a pointer in Go.
const MESSAGES: &str = "
ObjectMeta: name=1:string generateName=2:string namespace=3:string uid=5:string resourceVersion=6:string generation=7:int creationTimestamp=8:Time deletionTimestamp=9:Time deletionGracePeriodSeconds=10:int? labels=11:{string} annotations=12:{string} ownerReferences=13:[OwnerReference] finalizers=14:[string]
OwnerReference: kind=1:string name=3:string uid=4:string apiVersion=5:string controller=6:bool? blockOwnerDeletion=7:bool?
ObjectReference: kind=1:string namespace=2:string name=3:string uid=4:string apiVersion=5:string resourceVersion=6:string fieldPath=7:string
LocalObjectReference: name=1:string
LabelSelector: matchLabels=1:{string} matchExpressions=2:[LabelSelectorRequirement]
LabelSelectorRequirement: key=1:string operator=2:string values=3:[string]
DeleteOptions: gracePeriodSeconds=1:int? preconditions=2:Preconditions orphanDependents=3:bool? propagationPolicy=4:string dryRun=5:[string]
Preconditions: uid=1:string resourceVersion=2:string
ConfigMap: metadata=1:ObjectMeta data=2:{string} binaryData=3:{bytes} immutable=4:bool?
Secret: metadata=1:ObjectMeta data=2:{bytes} type=3:string stringData=4:{string} immutable=5:bool?
Namespace: metadata=1:ObjectMeta spec=2:NamespaceSpec
NamespaceSpec: finalizers=1:[string]
ServiceAccount: metadata=1:ObjectMeta secrets=2:[ObjectReference] imagePullSecrets=3:[LocalObjectReference] automountServiceAccountToken=4:bool?
Service: metadata=1:ObjectMeta spec=2:ServiceSpec
ServiceSpec: ports=1:[ServicePort] selector=2:{string} clusterIP=3:string type=4:string externalIPs=5:[string] sessionAffinity=7:string loadBalancerIP=8:string loadBalancerSourceRanges=9:[string] externalName=10:string externalTrafficPolicy=11:string healthCheckNodePort=12:int publishNotReadyAddresses=13:bool ipFamilyPolicy=17:string clusterIPs=18:[string] ipFamilies=19:[string] allocateLoadBalancerNodePorts=20:bool? loadBalancerClass=21:string internalTrafficPolicy=22:string
ServicePort: name=1:string protocol=2:string port=3:int targetPort=4:IntOrString nodePort=5:int appProtocol=6:string
ResourceQuota: metadata=1:ObjectMeta spec=2:ResourceQuotaSpec
ResourceQuotaSpec: hard=1:{Quantity} scopes=2:[string]
Binding: metadata=1:ObjectMeta target=2:ObjectReference
Eviction: metadata=1:ObjectMeta deleteOptions=2:DeleteOptions
PodDisruptionBudget: metadata=1:ObjectMeta spec=2:PodDisruptionBudgetSpec
PodDisruptionBudgetSpec: minAvailable=1:IntOrString? selector=2:LabelSelector? maxUnavailable=3:IntOrString? unhealthyPodEvictionPolicy=4:string
PriorityClass: metadata=1:ObjectMeta value=2:int? globalDefault=3:bool description=4:string preemptionPolicy=5:string
Lease: metadata=1:ObjectMeta spec=2:LeaseSpec
LeaseSpec: holderIdentity=1:string leaseDurationSeconds=2:int? acquireTime=3:Time renewTime=4:Time leaseTransitions=5:int? strategy=6:string preferredHolder=7:string
PolicyRule: verbs=1:[string] apiGroups=2:[string] resources=3:[string] resourceNames=4:[string] nonResourceURLs=5:[string]
Subject: kind=1:string apiGroup=2:string name=3:string namespace=4:string
RoleRef: apiGroup=1:string kind=2:string name=3:string
Role: metadata=1:ObjectMeta rules=2:[PolicyRule]
ClusterRole: metadata=1:ObjectMeta rules=2:[PolicyRule] aggregationRule=3:AggregationRule
AggregationRule: clusterRoleSelectors=1:[LabelSelector]
RoleBinding: metadata=1:ObjectMeta subjects=2:[Subject] roleRef=3:RoleRef
ClusterRoleBinding: metadata=1:ObjectMeta subjects=2:[Subject] roleRef=3:RoleRef
SelfSubjectReview: metadata=1:ObjectMeta
SelfSubjectRulesReview: metadata=1:ObjectMeta spec=2:SelfSubjectRulesReviewSpec
SelfSubjectRulesReviewSpec: namespace=1:string
SelfSubjectAccessReview: metadata=1:ObjectMeta spec=2:SubjectAccessReviewSpec
SubjectAccessReview: metadata=1:ObjectMeta spec=2:SubjectAccessReviewSpec
LocalSubjectAccessReview: metadata=1:ObjectMeta spec=2:SubjectAccessReviewSpec
SubjectAccessReviewSpec: resourceAttributes=1:ResourceAttributes nonResourceAttributes=2:NonResourceAttributes user=3:string groups=4:[string] uid=6:string
ResourceAttributes: namespace=1:string verb=2:string group=3:string version=4:string resource=5:string subresource=6:string name=7:string
NonResourceAttributes: path=1:string verb=2:string
";

type Messages = BTreeMap<&'static str, BTreeMap<u64, Field>>;

static PARSED: LazyLock<Messages> = LazyLock::new(|| {
    MESSAGES
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, fields)| (name, fields.split_whitespace().filter_map(parse_field).collect()))
        .collect()
});

fn parse_field(text: &'static str) -> Option<(u64, Field)> {
    let (name, rest) = text.split_once('=')?;
    let (number, kind) = rest.split_once(':')?;
    let optional = kind.ends_with('?');
    let kind = parse_type(kind.trim_end_matches('?'));
    Some((
        number.parse().ok()?,
        Field {
            name: name.to_owned(),
            kind,
            optional,
        },
    ))
}

fn parse_type(text: &'static str) -> Type {
    let inside = |open: char, close: char| text.strip_prefix(open).and_then(|rest| rest.strip_suffix(close));
    if let Some(item) = inside('[', ']') {
        return Type::List(Box::new(parse_type(item)));
    }
    if let Some(item) = inside('{', '}') {
        return Type::Map(Box::new(parse_type(item)));
    }
    match text {
        "string" => Type::Text,
        "bytes" => Type::Base64,
        "bool" => Type::Bool,
        "int" => Type::Integer,
        name => Type::Message(name),
    }
}

/// Whether a message is described here.
pub(super) fn is_known(message: &str) -> bool {
    PARSED.contains_key(message)
}

/// A field by its number.
pub(super) fn field(message: &str, number: u64) -> Option<&'static Field> {
    PARSED.get(message)?.get(&number)
}

/// A field by its name.
pub(super) fn by_name(message: &str, name: &str) -> Option<&'static Field> {
    PARSED.get(message)?.values().find(|field| field.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_that_a_field_names_is_described() {
        fn named(kind: &Type) -> Option<&'static str> {
            match kind {
                Type::Message(name) => Some(name),
                Type::List(item) | Type::Map(item) => named(item),
                _ => None,
            }
        }
        let special = ["Time", "Quantity", "IntOrString"];
        for (message, fields) in PARSED.iter() {
            for name in fields.values().filter_map(|field| named(&field.kind)) {
                assert!(is_known(name) || special.contains(&name), "{message} names {name}");
            }
        }
    }
}
