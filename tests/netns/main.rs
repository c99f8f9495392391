//! Real packets from real clients to real servers, in laboratories that read manifests.
//!
//! One file per behaviour.

mod health;
