//! Names to addresses, all of which are looked at before any is connected to.

use std::{
    fmt::Debug,
    io,
    net::{IpAddr, SocketAddr},
};

use futures::future::BoxFuture;
use reqwest::Url;

use super::{fetch::FetchError, hosts};

/// Who knows the addresses of a host.
pub trait Resolve: Debug + Send + Sync {
    /// All addresses of a host, each with the port.
    fn resolve<'a>(&'a self, host: &'a str, port: u16) -> BoxFuture<'a, io::Result<Vec<SocketAddr>>>;
}

/// The resolver of this machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemResolver;

impl Resolve for SystemResolver {
    fn resolve<'a>(&'a self, host: &'a str, port: u16) -> BoxFuture<'a, io::Result<Vec<SocketAddr>>> {
        Box::pin(async move { Ok(tokio::net::lookup_host((host, port)).await?.collect()) })
    }
}

/// Why an address is not connected to; None if it is public. [`super::address::refusal`] outside of tests.
pub type Screen = fn(IpAddr) -> Option<&'static str>;

/// The addresses of a URL's host. One that is not public refuses them all: a name that leads inside is no name to trust.
pub async fn addresses(url: &Url, resolver: &dyn Resolve, screen: Screen) -> Result<Vec<SocketAddr>, FetchError> {
    let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else {
        return Err(FetchError::Refused("the URL names no host".to_owned()));
    };
    let addresses = match hosts::literal(url) {
        Some(address) => vec![SocketAddr::new(address, port)],
        None => {
            let found = resolver.resolve(host, port).await;
            found.map_err(|_| FetchError::Failed(format!("{host} has no address")))?
        }
    };
    if addresses.is_empty() {
        return Err(FetchError::Failed(format!("{host} has no address")));
    }
    match addresses.iter().find_map(|address| screen(address.ip())) {
        Some(reason) => Err(FetchError::Refused(format!("{host} leads to {reason}"))),
        None => Ok(addresses),
    }
}
