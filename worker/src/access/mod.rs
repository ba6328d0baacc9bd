//! Who may use the API: keys, of which this process only ever sees a hash in a file, and what each may ask for.
//!
//! | file | what |
//! |---|---|
//! | [`key_line`] | one line of the file: name, hash, limits |
//! | [`keys`] | the keys of now, replaced when the file changes |

pub mod key_line;
pub mod keys;

pub use key_line::{KeyLine, Rate};
pub use keys::{Key, Keys, Place, Throttled};
