//! The oracle tier: random cluster states and packets through the real programs and through the oracle, which is a model
//! of the contract of its own. Any disagreement is a mistake of one of the two.
//!
//! `PORTOLAN_CASES` says how many packets are compared, `PORTOLAN_SEED` where the random numbers begin (`random`: at another
//! place in every run). A failure prints the seed of its case, which replays it. Without it they begin at the same place, so
//! that a change is judged by what it changes.

mod broken;
mod kinds;
mod mutate;
mod objects;
mod random;
mod run;
mod script;
mod shape;
mod shrink;
mod universe;
mod verdict;

use dataplane_tests::packet::in_namespace;
use dataplane_user::kernel::pins::Pins;
use random::Random;
use run::Bench;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::time::Instant;

/// Packets that are compared if nothing else is said.
const CASES: usize = 100_000;
/// Broken packets for each of them.
const BROKEN: usize = 10;

/// Where the random numbers begin if nothing else is said.
const SEED: u64 = 0x706f_7274_6f6c_616e;

/// A number from the environment, decimal or hexadecimal.
fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    let number = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    Some(number.unwrap_or_else(|_| panic!("{variable}={text} is no number")))
}

/// Takes the file system of pins away, and its folder.
fn unmount(folder: &Path) {
    let path = CString::new(folder.as_os_str().as_bytes()).unwrap();
    // SAFETY: the string outlives the call.
    assert_eq!(unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) }, 0);
    std::fs::remove_dir(folder).unwrap();
}

/// Where the random numbers begin.
fn seed() -> u64 {
    if std::env::var("PORTOLAN_SEED").is_ok_and(|text| text == "random") {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        return Random::new(now.map_or(0, |time| time.as_nanos() as u64)).next();
    }
    number("PORTOLAN_SEED").unwrap_or(SEED)
}

/// H6, F1 to F8, T1 to T5, P1 to P7, P9 to P14, P16 to P21, S1 to S3, S5 to S7, C1, C2, C4, Z1 to Z5: whatever the Services,
/// whoever calls, wherever the packet is met.
#[test]
fn programs_and_contract_agree_on_every_packet() {
    in_namespace(|| {
        universe::set_up();
        let cases = number("PORTOLAN_CASES").map_or(CASES, |cases| cases as usize);
        let folder = std::env::temp_dir().join(format!("portolan-oracle-{}", std::process::id()));
        let pins = Pins::new(&folder);
        let bench = Bench::new().rehearsing(&pins);
        // The maps live as long as somebody has them open, and the file system as long as nobody unmounts it.
        let (mut bench, mut seed, start) = (bench, seed(), Instant::now());
        unmount(&folder);
        println!("first seed {seed:#x}");
        let mut scripts = 0;
        while bench.packets < cases {
            let script = script::random(&mut Random::new(seed));
            if let Err(disagreement) = bench.run(&script) {
                let packets = bench.packets;
                let small = shrink::shrink(&mut bench, &script);
                panic!(
                    "after {packets} packets, {disagreement}\n\n{small}\nreplay it with PORTOLAN_SEED={seed:#x}"
                );
            }
            scripts += 1;
            seed = Random::new(seed).next();
        }
        let packets = bench.packets;
        println!("{packets} packets in {scripts} cases agree, in {:.1} s", start.elapsed().as_secs_f32());
        println!("{} of them were rehearsed before", bench.rehearsed);
        assert!(bench.rehearsed > packets / 20, "{} of {packets} packets were rehearsed", bench.rehearsed);
        bench.kinds.assert_met(packets);
    });
}

/// Z4, P21: whatever a packet holds, it leaves as it came, as a rewrite that changes nothing else, or not at all; each is
/// counted once.
#[test]
fn broken_packets_leave_whole_or_not_at_all() {
    in_namespace(|| {
        universe::set_up();
        let cases = BROKEN * number("PORTOLAN_CASES").map_or(CASES, |cases| cases as usize);
        let (mut bench, mut seed, start, mut sent) = (Bench::new(), seed(), Instant::now(), 0);
        println!("broken packets: first seed {seed:#x}");
        while sent < cases {
            match mutate::run(&mut bench, seed) {
                Ok(more) => sent += more,
                Err(error) => panic!("{error}\nreplay it with PORTOLAN_SEED={seed:#x}"),
            }
            seed = Random::new(seed).next();
        }
        println!("{sent} broken packets, in {:.1} s", start.elapsed().as_secs_f32());
    });
}
