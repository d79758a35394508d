//! STUB.
/// Stub.
pub trait Progress: Sync {
    /// Stub.
    fn total(&self, units: u64);
    /// Stub.
    fn advance(&self, done: u64);
    /// Stub.
    fn message(&self, text: &str);
    /// Stub.
    fn cancelled(&self) -> bool { false }
}
/// Stub.
#[derive(Debug)]
pub struct Silent;
impl Progress for Silent {
    fn total(&self, _: u64) {}
    fn advance(&self, _: u64) {}
    fn message(&self, _: &str) {}
}
