//! Versions: hashes of content.

use std::fmt::Write as _;
use std::sync::Arc;

use aws_lc_rs::digest;

/// Bytes of the hash that make a version. Names and addresses come from users, so accidental and made collisions of a
/// shorter hash would hide a change.
const VERSION_BYTES: usize = 16;

/// The version of an encoded resource: the first half of its SHA-256, in hexadecimal.
pub(crate) fn version_of(content: &[u8]) -> Arc<str> {
    let hash = digest::digest(&digest::SHA256, content);
    let mut text = String::with_capacity(2 * VERSION_BYTES);
    for byte in &hash.as_ref()[..VERSION_BYTES] {
        write!(text, "{byte:02x}").expect("a String takes everything");
    }
    text.into()
}
