//! The laboratory with a real API server: what the control plane's controllers, the lab's kubelet and the agents make of each
//! other.

mod agents;
mod alerts;
mod boot;
mod controlplane;
mod deploy;
mod helm;
mod names;
mod recipes;
mod shared;
mod told;
mod world;
