//! placeholder
pub mod catalog; pub mod journal; pub mod ledger; pub mod rows; pub mod states; pub mod settings; pub mod seal_file;
