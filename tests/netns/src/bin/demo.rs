//! `cargo xtask demo`.
fn main() {}
