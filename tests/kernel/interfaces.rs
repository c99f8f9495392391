//! Interfaces, addresses and routes over netlink: what is known is what is there, however much came and went.

use dataplane_user::kernel::links::{self, Interfaces};
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::sync::watch::Receiver;

/// Runs something in a network namespace of its own.
fn in_own_namespace(test: impl FnOnce(&Runtime) + Send) {
    let enter = || {
        // SAFETY: the call changes the namespace of this thread alone, which ends with the test.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "{}", std::io::Error::last_os_error());
        // One thread: where the test does something else, nobody reads what the kernel tells.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        test(&runtime);
    };
    std::thread::scope(|scope| scope.spawn(enter).join()).unwrap_or_else(|it| std::panic::resume_unwind(it));
}

/// Runs many lines of `ip` in the namespace of this thread.
fn ip(lines: impl IntoIterator<Item = String>) {
    let mut ip = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    let lines: String = lines.into_iter().map(|line| line + "\n").collect();
    ip.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    assert!(ip.wait().unwrap().success(), "ip -batch");
}

/// What somebody finds who begins now.
fn afresh(runtime: &Runtime) -> Interfaces {
    runtime.block_on(async { links::follow().await.unwrap().borrow().clone() })
}

/// Waits until what is known is what is there, and stays so.
#[track_caller]
fn agrees(runtime: &Runtime, known: &mut Receiver<Interfaces>) {
    let there = afresh(runtime);
    runtime.block_on(async {
        let same = tokio::time::timeout(Duration::from_secs(20), known.wait_for(|known| *known == there));
        assert!(same.await.is_ok(), "there is {there:?}, known is {:?}", known.borrow());
        tokio::time::sleep(Duration::from_millis(500)).await;
    });
    assert_eq!(*known.borrow(), there, "it did not stay so");
}

#[test]
fn what_was_lost_in_a_flood_is_read_anew_and_older_messages_are_not_believed() {
    in_own_namespace(|runtime| {
        let address = |verb: &str| format!("addr {verb} 192.0.2.1/32 dev known");
        ip([
            "link add known type veth peer name other".to_owned(),
            "link set known up".to_owned(),
            address("add"),
        ]);
        let mut known = runtime.block_on(links::follow()).unwrap();
        // That the address went, and that the interface came, is the first to be told; that it came back and went is lost.
        let flood = (0..15_000)
            .flat_map(|_| ["add", "del"])
            .map(|verb| format!("addr {verb} 198.51.100.1/32 dev known"));
        let first = [address("del"), "link add phantom type veth peer name spirit".to_owned()];
        let last = [address("add"), "link del phantom".to_owned()];
        ip(first.into_iter().chain(flood).chain(last));
        agrees(runtime, &mut known);
        let interfaces = known.borrow();
        assert_eq!(interfaces.links.len(), 3, "{interfaces:?}");
        assert!(interfaces.addresses.values().any(|addresses| !addresses.is_empty()));
    });
}

#[test]
fn a_thousand_interfaces_that_come_and_go_leave_what_is_there() {
    in_own_namespace(|runtime| {
        let mut known = runtime.block_on(links::follow()).unwrap();
        let begun = Instant::now();
        let add = |n: usize| format!("link add pod{n} type veth peer name peer{n}");
        let del = |n: usize| format!("link del pod{n}");
        // Those of one round come while those of the last one go.
        for round in 0..5 {
            let of = |round: usize| round * 100..(round + 1) * 100;
            ip(of(round)
                .flat_map(|n| [add(n), format!("link set pod{n} up"), format!("link set peer{n} up")]));
            runtime.block_on(async { tokio::time::sleep(Duration::from_millis(10)).await });
            if round > 0 {
                ip(of(round - 1).map(del));
            }
        }
        agrees(runtime, &mut known);
        assert_eq!(known.borrow().links.len(), 1 + 2 * 100);
        println!("500 pairs within {:?}", begun.elapsed());
        // While most go at once, which the kernel does in the background of nobody.
        ip((400..500).map(del));
        agrees(runtime, &mut known);
        assert_eq!(known.borrow().links.len(), 1, "lo alone");
    });
}
