//! Guests and front ends that mean no good.
