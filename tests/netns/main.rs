//! Real packets from real clients to real servers, in laboratories that read manifests.
//!
//! One file per behaviour. Tests share laboratories of one kind but no Service; see [`world`].

mod errors;
mod flows;
mod fragments;
mod health;
mod load;
mod own;
mod policies;
mod refusals;
mod sockets;
mod world;
