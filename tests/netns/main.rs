//! Real packets from real clients to real servers, in laboratories that read manifests.
//!
//! One file per behaviour. Tests share laboratories of one kind but no Service; see [`world`].

mod affinity;
mod alive;
mod api_server;
mod attached;
mod choice;
mod death;
mod errors;
mod explain;
mod floods;
mod flows;
mod fragments;
mod health;
mod layouts;
mod load;
mod load_balancers;
mod manifests;
mod masquerade;
mod open;
mod others;
mod own;
mod policies;
mod pressure;
mod probes;
mod refusals;
mod retry;
mod room;
mod service_routes;
mod soak;
mod sockets;
mod start;
mod status;
mod tries;
mod watch;
mod world;
