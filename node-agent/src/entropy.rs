//! Randomness for jitter; nothing secret comes from here.

/// A random number.
pub(crate) fn number() -> u32 {
    let mut bytes = [0; 4];
    // Without randomness there is no jitter, which delays nothing.
    match aws_lc_rs::rand::fill(&mut bytes) {
        Ok(()) | Err(_) => u32::from_ne_bytes(bytes),
    }
}
