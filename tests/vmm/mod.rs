//! Virtual machines of our own on the KVM of this machine, with a guest that does as it is told (fixtures/toy-guest).
//!
//! Where KVM emulates ring 0, as in many virtual machines, an ordinary kernel cannot run and this guest can.

mod attacked;
mod checkpoints;
mod commands;
mod confined;
mod devices;
mod disks;
mod life;
mod live;
mod moved;
mod nested;
mod network;
mod state;
mod stuck;
mod toy;
