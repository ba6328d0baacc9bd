//! Loopback addresses for pods and services. Linux routes all of 127.0.0.0/8 to the loopback interface.
//!
//! A sandbox claims a pair of /24 blocks, 127.A.B.0/24 for pods and 127.(A + 127).B.0/24 for services, so that
//! several sandboxes on one machine never meet. The claim is a listening socket on a fixed port of the block: it
//! ends with the process, however that ends.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, TcpListener},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use sha2::{Digest, Sha256};

/// Port whose listener holds a block.
const CLAIM_PORT: u16 = 10_255;
/// Blocks tried before giving up.
const ATTEMPTS: u16 = 512;

/// A claimed pair of blocks; dropping it gives them back.
#[derive(Debug)]
pub struct AddressBlock {
    second: u8,
    third: u8,
    _claim: TcpListener,
}

/// Why no address could be had.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// Every block that was tried is in use.
    #[error("no free block of loopback addresses among {ATTEMPTS}: {0}")]
    NoBlock(io::Error),
    /// All addresses of the block are in use.
    #[error("no free address for {0}: all 253 of the block are in use")]
    Exhausted(String),
}

impl AddressBlock {
    /// Claims the block that `dir` hashes to, or the next free one.
    pub fn claim(dir: &Path) -> Result<Arc<Self>, AddressError> {
        let digest = Sha256::digest(dir.as_os_str().as_encoded_bytes());
        let first = u16::from_be_bytes([digest[0], digest[1]]);
        let mut last_error = io::Error::from(io::ErrorKind::AddrInUse);
        for step in 0..ATTEMPTS {
            let slot = first.wrapping_add(step);
            let [high, third] = slot.to_be_bytes();
            let second = 1 + high % 127;
            match TcpListener::bind((Ipv4Addr::new(127, second, third, 1), CLAIM_PORT)) {
                Ok(claim) => {
                    return Ok(Arc::new(Self {
                        second,
                        third,
                        _claim: claim,
                    }));
                }
                Err(error) => last_error = error,
            }
        }
        Err(AddressError::NoBlock(last_error))
    }

    /// Address of the node.
    pub fn host(&self) -> Ipv4Addr {
        Ipv4Addr::new(127, self.second, self.third, 1)
    }

    /// Address `last` of the pods' block.
    pub fn pod(&self, last: u8) -> Ipv4Addr {
        Ipv4Addr::new(127, self.second, self.third, last)
    }

    /// Address `last` of the services' block.
    pub fn service(&self, last: u8) -> Ipv4Addr {
        Ipv4Addr::new(127, self.second + 127, self.third, last)
    }
}

/// Addresses 2 to 254 of a block, each held by one key. Never hands out an address again while others were unused
/// for longer, so that a late connection does not meet the wrong pod.
#[derive(Debug)]
pub struct AddressPool {
    state: Mutex<PoolState>,
}

#[derive(Debug)]
struct PoolState {
    held: HashMap<String, u8>,
    next: u8,
}

impl Default for AddressPool {
    fn default() -> Self {
        Self {
            state: Mutex::new(PoolState {
                held: HashMap::new(),
                next: 2,
            }),
        }
    }
}

impl AddressPool {
    /// The last part of the address of `key`: the one it has, `wanted` if that is free, else the next free one.
    pub fn allocate(&self, key: &str, wanted: Option<u8>) -> Result<u8, AddressError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = state.held.get(key) {
            return Ok(*last);
        }
        let free = |state: &PoolState, last: u8| (2..=254).contains(&last) && !state.held.values().any(|h| *h == last);
        let start = state.next;
        let last = wanted
            .filter(|last| free(&state, *last))
            .or_else(|| (start..=254).chain(2..start).find(|last| free(&state, *last)))
            .ok_or_else(|| AddressError::Exhausted(key.to_owned()))?;
        state.next = if last == 254 { 2 } else { last + 1 };
        state.held.insert(key.to_owned(), last);
        Ok(last)
    }

    /// Gives the address of `key` back.
    pub fn release(&self, key: &str) {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .held
            .remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_keeps_its_address_and_another_gets_another() {
        let pool = AddressPool::default();
        assert_eq!(pool.allocate("a", None).unwrap(), 2);
        assert_eq!(pool.allocate("b", Some(2)).unwrap(), 3);
        assert_eq!(pool.allocate("a", None).unwrap(), 2);
        assert_eq!(pool.allocate("c", Some(200)).unwrap(), 200);
    }

    #[test]
    fn a_released_address_is_used_again_last() {
        let pool = AddressPool::default();
        for n in 0..252 {
            pool.allocate(&format!("k{n}"), None).unwrap();
        }
        pool.release("k0");
        assert_eq!(pool.allocate("x", None).unwrap(), 254);
        assert_eq!(pool.allocate("y", None).unwrap(), 2);
        assert!(matches!(pool.allocate("z", None), Err(AddressError::Exhausted(_))));
    }

    #[test]
    fn two_claims_of_one_directory_get_different_blocks() {
        let dir = Path::new("/some/sandbox");
        let (first, second) = (AddressBlock::claim(dir).unwrap(), AddressBlock::claim(dir).unwrap());
        assert_ne!(first.host(), second.host());
        assert_ne!(first.pod(2), first.service(2));
    }
}
