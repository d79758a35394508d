//! Bringing images into the pool.
