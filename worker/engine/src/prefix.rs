//! Keys of the prefix cache: what a block of keys and values was computed from, everything before it included.

use sha2::{Digest, Sha256};

/// Digest of all tokens up to the end of a block, and of the weights.
pub type Key = [u8; 32];

/// The key before the first block: keys and values of other weights are never found.
pub fn root(version: &str) -> Key {
    Sha256::digest(version.as_bytes()).into()
}

/// The key of the block after the one with key `parent`; `content` says what its tokens are.
pub fn next(parent: &Key, content: &[u8]) -> Key {
    let mut hash = Sha256::new();
    hash.update(parent);
    hash.update(content);
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_depends_on_weights_content_and_everything_before() {
        let keys = [
            next(&root("a"), b"x"),
            next(&root("b"), b"x"),
            next(&root("a"), b"y"),
            next(&next(&root("a"), b"y"), b"x"),
        ];
        for (index, key) in keys.iter().enumerate() {
            assert!(!keys[..index].contains(key));
        }
        assert_eq!(keys[0], next(&root("a"), b"x"));
    }
}
