//! Host files under one directory.
