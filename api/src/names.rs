//! Every label, annotation, finalizer, port, mount path, condition type and reason, once.

/// API group of every kind.
pub const GROUP: &str = "flotilla.dev";
/// API version of every kind.
pub const VERSION: &str = "v1alpha1";
/// Field manager of the operator's server-side applies.
pub const FIELD_MANAGER: &str = "flotilla-operator";

/// Labels.
pub mod label {
    /// `flotilla`.
    pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
    /// Value of [`MANAGED_BY`].
    pub const MANAGED_BY_VALUE: &str = "flotilla-operator";
    /// Kind of the owner, lower case (`trainingjob`).
    pub const OWNER_KIND: &str = "flotilla.dev/owner-kind";
    /// Name of the owner.
    pub const OWNER_NAME: &str = "flotilla.dev/owner";
    /// `prepare`, `train`, `rollout`, `serve`, `verify`.
    pub const ROLE: &str = "flotilla.dev/role";
    /// How often the owner's pods were given up: pods of an older attempt no longer count.
    pub const ATTEMPT: &str = "flotilla.dev/attempt";
    /// Place of a rollout pod among its equals, from 0.
    pub const INDEX: &str = "flotilla.dev/index";
    /// Hash of what a serving pod runs.
    pub const REVISION: &str = "flotilla.dev/revision";
    /// TrainingJob that produced a ModelCheckpoint.
    pub const TRAINING_JOB: &str = "flotilla.dev/training-job";
}

/// Annotations.
pub mod annotation {
    /// Sandbox only: directory whose files a new claim begins with. `flotilla run` looks for it beside the manifest and in
    /// each folder above; with kubectl it is relative to the folder in which the sandbox was started. A cluster ignores it.
    pub const SEED_FROM: &str = "sandbox.flotilla.dev/seed-from";
}

/// Name of the worker's HTTP port and its number.
pub const HTTP_PORT_NAME: &str = "http";
/// Port of the worker's HTTP server.
pub const HTTP_PORT: u16 = 8080;
/// Name of the worker's container.
pub const CONTAINER: &str = "worker";
/// Environment variable with the pod's address (downward API); the worker listens there.
pub const POD_IP_ENV: &str = "POD_IP";
/// Directory of the role config.
pub const CONFIG_DIR: &str = "/etc/flotilla/config";
/// The role config's file name, which is also the ConfigMap's key.
pub const ROLE_CONFIG_FILE: &str = "role.json";
/// The role config.
pub const ROLE_CONFIG_PATH: &str = "/etc/flotilla/config/role.json";
/// Directory of the token that guards role-internal endpoints.
pub const TOKEN_DIR: &str = "/etc/flotilla/token";
/// The token's file name, which is also the Secret's key.
pub const TOKEN_FILE: &str = "token";
/// Directory below which claims are mounted by name.
pub const VOLUME_DIR: &str = "/var/lib/flotilla/volumes";
/// Where a container leaves its last [`crate::progress::Progress`].
pub const TERMINATION_LOG: &str = "/dev/termination-log";

/// Exit codes of the worker.
pub mod exit {
    /// The goal was reached (or the role was asked to stop and saved its state).
    pub const OK: i32 = 0;
    /// Anything that a new attempt may cure.
    pub const RETRYABLE: i32 = 1;
    /// Invalid configuration, data or weights: a new attempt would end the same way.
    pub const PERMANENT: i32 = 78;
    /// Asked to stop (SIGTERM); the state was saved and the run can be resumed.
    pub const SUSPENDED: i32 = 143;
}

/// Paths of role-internal endpoints; the bearer token of the job opens them.
pub mod path {
    /// `GET`, every role: [`crate::progress::Progress`].
    pub const PROGRESS: &str = "/progress";
    /// `POST`, role `serve`: no new requests are taken.
    pub const DRAIN: &str = "/drain";
    /// `PUT`, role `train`: [`crate::rollout::RolloutPods`].
    pub const ROLLOUT_PODS: &str = "/v1/rollout-pods";
    /// `POST`, role `rollout`: groups of completions.
    pub const ROLLOUTS: &str = "/v1/rollouts";
    /// `PUT`, role `rollout`: the weights to sample with.
    pub const WEIGHTS: &str = "/v1/weights";
}

/// Condition types.
pub mod condition {
    /// Spec and references can be acted on.
    pub const READY: &str = "Ready";
    /// The run was suspended by its spec.
    pub const SUSPENDED: &str = "Suspended";
    /// All pods have a node.
    pub const PODS_SCHEDULED: &str = "PodsScheduled";
    /// The model is in memory.
    pub const MODEL_LOADED: &str = "ModelLoaded";
    /// The role does its work.
    pub const RUNNING: &str = "Running";
    /// The goal was reached. Sticky.
    pub const COMPLETE: &str = "Complete";
    /// The goal cannot be reached. Sticky.
    pub const FAILED: &str = "Failed";
    /// Enough replicas answer.
    pub const AVAILABLE: &str = "Available";
    /// Replicas move towards the spec.
    pub const PROGRESSING: &str = "Progressing";
}

/// Condition and event reasons.
pub mod reason {
    /// A referenced object does not exist yet or has not reached its goal.
    pub const WAITING_FOR_REFERENCE: &str = "WaitingForReference";
    /// The spec asks for something that cannot be.
    pub const INVALID_SPEC: &str = "InvalidSpec";
    /// Pods were created.
    pub const PODS_CREATED: &str = "PodsCreated";
    /// A pod was lost; a new one continues from the newest stable checkpoint.
    pub const RESTARTED: &str = "Restarted";
    /// Rollout pods were lost and replaced; the learner went on.
    pub const ROLLOUT_REPLACED: &str = "RolloutPodsReplaced";
    /// More pods failed than `failurePolicy.maxRestarts` allows.
    pub const RESTART_LIMIT: &str = "RestartLimitExceeded";
    /// The worker said that a new attempt would end the same way.
    pub const PERMANENT_FAILURE: &str = "PermanentFailure";
    /// `activeDeadlineSeconds` is over.
    pub const DEADLINE: &str = "DeadlineExceeded";
    /// `spec.suspend` is set.
    pub const SUSPENDED: &str = "Suspended";
    /// `spec.suspend` was unset.
    pub const RESUMED: &str = "Resumed";
    /// The goal was reached.
    pub const COMPLETED: &str = "Completed";
    /// A stable checkpoint was registered.
    pub const CHECKPOINT: &str = "CheckpointRegistered";
    /// The digest of files and resource differ.
    pub const DIGEST_MISMATCH: &str = "DigestMismatch";
    /// More rows were bad than `maxBadRecords` allows.
    pub const TOO_MANY_BAD_RECORDS: &str = "TooManyBadRecords";
    /// The object is past its time to live.
    pub const TTL_EXPIRED: &str = "TTLExpired";
}
