//! Files in memory that crash.
