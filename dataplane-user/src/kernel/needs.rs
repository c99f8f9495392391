//! What the programs need of a kernel, asked of the kernel itself: distributions bring much to old kernels, and leave out what others
//! have. Must never refuse a kernel for what cannot be found out.

use super::bpf::{self, MapFd, instruction};
use std::os::fd::OwnedFd;
use std::{fmt, io};

/// `BPF_F_MMAPABLE`.
const MMAPABLE: u32 = 1 << 10;
/// `BPF_F_XDP_HAS_FRAGS`.
const HAS_FRAGS: u32 = 1 << 5;
/// Bytes for what the verifier says of a program of a few instructions.
const LOG: usize = 1 << 14;

/// A type of programs, by the number that the kernel gives it (`enum bpf_prog_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum ProgramType {
    /// tc.
    SchedCls = 3,
    /// XDP.
    Xdp = 6,
    /// The hook of a socket that is released.
    CgroupSock = 9,
    /// The hooks of `connect` and its like.
    CgroupSockAddr = 18,
}

impl fmt::Display for ProgramType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SchedCls => "tc",
            Self::Xdp => "XDP",
            Self::CgroupSock | Self::CgroupSockAddr => "sockets",
        })
    }
}

impl ProgramType {
    /// `enum bpf_attach_type` where the kernel must know it as it loads a program: of `sock_release`, and of `connect`.
    const fn attach_type(self) -> u32 {
        match self {
            Self::SchedCls | Self::Xdp => 0,
            Self::CgroupSock => 34,
            Self::CgroupSockAddr => 10,
        }
    }
}

/// Something that a kernel has or has not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// A helper by its name and number (`enum bpf_func_id`), in programs of a type.
    Helper(&'static str, u32, ProgramType),
    /// `atomic_fetch_add` and `cmpxchg` on 64 bits.
    Atomics,
    /// Arrays that a process maps into its memory.
    MappedArrays,
    /// XDP programs for packets in several buffers.
    XdpFrags,
}

/// Something that is needed, and the release of Linux that it came with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needed {
    /// What.
    pub need: Need,
    /// Since when upstream has it.
    pub since: &'static str,
}

impl fmt::Display for Needed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { need, since } = self;
        match need {
            Need::Helper(name, ..) => write!(f, "bpf_{name} ({since})"),
            Need::Atomics => write!(f, "atomic operations that give the old value ({since})"),
            Need::MappedArrays => write!(f, "arrays in a process's memory ({since})"),
            Need::XdpFrags => write!(f, "XDP for packets longer than a page ({since})"),
        }
    }
}

/// A row of a helper.
const fn helper(name: &'static str, number: u32, kind: ProgramType, since: &'static str) -> Needed {
    Needed { need: Need::Helper(name, number, kind), since }
}

use ProgramType::{CgroupSock, CgroupSockAddr, SchedCls, Xdp};

/// All that the programs need. Each helper that an object calls is in it, as a test sees to.
pub const NEEDS: &[Needed] = &[
    helper("map_lookup_elem", 1, SchedCls, "3.19"),
    helper("map_update_elem", 2, SchedCls, "3.19"),
    helper("map_delete_elem", 3, SchedCls, "3.19"),
    helper("ktime_get_ns", 5, SchedCls, "4.1"),
    helper("ktime_get_ns", 5, CgroupSockAddr, "4.1"),
    helper("get_prandom_u32", 7, SchedCls, "4.1"),
    helper("skb_store_bytes", 9, SchedCls, "4.1"),
    helper("l4_csum_replace", 11, SchedCls, "4.1"),
    helper("skb_vlan_pop", 19, SchedCls, "4.3"),
    helper("redirect", 23, SchedCls, "4.4"),
    helper("skb_load_bytes", 26, SchedCls, "4.5"),
    helper("skb_change_tail", 38, SchedCls, "4.9"),
    helper("skb_pull_data", 39, SchedCls, "4.9"),
    helper("skb_change_head", 43, SchedCls, "4.10"),
    helper("get_socket_cookie", 46, CgroupSockAddr, "4.12"),
    helper("skb_adjust_room", 50, SchedCls, "4.13"),
    helper("xdp_adjust_tail", 65, Xdp, "4.18"),
    helper("fib_lookup", 69, SchedCls, "4.18"),
    helper("fib_lookup", 69, Xdp, "4.18"),
    helper("sk_release", 86, SchedCls, "4.20"),
    helper("skc_lookup_tcp", 99, SchedCls, "5.2"),
    helper("sk_storage_get", 107, CgroupSockAddr, "5.2"),
    helper("sk_storage_get", 107, CgroupSock, "5.8"),
    helper("jiffies64", 118, SchedCls, "5.6"),
    helper("get_netns_cookie", 122, CgroupSockAddr, "5.7"),
    helper("ringbuf_reserve", 131, SchedCls, "5.8"),
    helper("ringbuf_submit", 132, SchedCls, "5.8"),
    helper("ringbuf_discard", 133, SchedCls, "5.8"),
    helper("redirect_neigh", 152, SchedCls, "5.10"),
    helper("ktime_get_coarse_ns", 160, SchedCls, "5.11"),
    helper("ktime_get_coarse_ns", 160, CgroupSockAddr, "5.11"),
    helper("check_mtu", 163, SchedCls, "5.12"),
    helper("check_mtu", 163, Xdp, "5.12"),
    helper("loop", 181, SchedCls, "5.17"),
    helper("set_retval", 187, CgroupSockAddr, "5.18"),
    helper("xdp_get_buff_len", 188, Xdp, "5.18"),
    helper("xdp_load_bytes", 189, Xdp, "5.18"),
    Needed { need: Need::MappedArrays, since: "5.5" },
    Needed { need: Need::Atomics, since: "5.12" },
    Needed { need: Need::XdpFrags, since: "5.18" },
];

/// What of it this kernel has not. What the kernel will not say, for want of rights or memory, counts as there: loading tells.
pub fn missing() -> Vec<Needed> {
    missing_by(has)
}

fn missing_by(has: impl Fn(Need) -> io::Result<bool>) -> Vec<Needed> {
    let mut missing: Vec<Needed> = Vec::new();
    for needed in NEEDS {
        let there = has(needed.need).unwrap_or_else(|error| {
            tracing::debug!("cannot find out whether the kernel has {needed}: {error}");
            true
        });
        let named = missing.iter().any(|other| other.to_string() == needed.to_string());
        if !there && !named {
            missing.push(*needed);
        }
    }
    missing
}

fn has(need: Need) -> io::Result<bool> {
    /// `r0 = 0; exit`
    const END: [u64; 2] = [instruction(0xb7, 0, 0, 0, 0), instruction(0x95, 0, 0, 0, 0)];
    match need {
        // Its arguments may be refused, with EACCES or EINVAL: not known is what the verifier calls so.
        Need::Helper(_, number, kind) => {
            let call = instruction(0x85, 0, 0, 0, number as i32);
            let mut log = [0; LOG];
            match load(kind, 0, &[call, END[0], END[1]], &mut log) {
                Err(error) if matches!(error.raw_os_error(), Some(libc::EACCES | libc::EINVAL)) => {
                    Ok(!is_unknown(&log))
                }
                result => result.map(|_| true),
            }
        }
        Need::Atomics => {
            // *(u64 *)(r10 - 8) = 0; r1 = 1; r1 = atomic_fetch_add((u64 *)(r10 - 8), r1)
            let (store, one) = (instruction(0x7a, 10, 0, -8, 0), instruction(0xb7, 1, 0, 0, 1));
            let fetch_add = instruction(0xdb, 10, 1, -8, 1);
            knows(load(SchedCls, 0, &[store, one, fetch_add, END[0], END[1]], &mut [0; LOG]))
        }
        Need::MappedArrays => knows(MapFd::create("probe", bpf::TYPE_ARRAY, MMAPABLE, [4, 8], 1)),
        Need::XdpFrags => knows(load(Xdp, HAS_FRAGS, &END, &mut [0; LOG])),
    }
}

/// Whether the kernel took something: EINVAL says that it does not know it.
fn knows<T>(result: io::Result<T>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether the verifier's words are that it does not know a helper, or not in programs of the type.
fn is_unknown(log: &[u8]) -> bool {
    /// Of a number that no helper has, and of one that others have: the last since 6.12, the one before it until then.
    const WORDS: [&str; 3] = ["invalid func ", "unknown func ", "cannot use helper "];
    let log = String::from_utf8_lossy(log);
    WORDS.iter().any(|words| log.contains(words))
}

fn load(kind: ProgramType, flags: u32, program: &[u64], log: &mut [u8]) -> io::Result<OwnedFd> {
    bpf::load_program(program, kind as u32, kind.attach_type(), flags, log)
}

#[cfg(test)]
mod tests {
    use super::super::object::BYTES;
    use super::*;
    use std::collections::BTreeSet;

    /// Calls of helpers in an object: instructions `call`, with no register, that name a number.
    fn helpers_of(object: &[u8]) -> BTreeSet<u32> {
        const CALL: u8 = 0x85;
        let object = aya_obj::Object::parse(object).unwrap();
        let instructions = object.functions.values().flat_map(|function| &function.instructions);
        let calls = instructions.filter(|instruction| instruction.code == CALL && instruction.src_reg() == 0);
        calls.map(|instruction| instruction.imm as u32).collect()
    }

    #[test]
    fn every_helper_that_the_programs_call_is_asked_for() {
        let named = |number: &u32| {
            NEEDS.iter().any(|needed| matches!(needed.need, Need::Helper(_, other, _) if other == *number))
        };
        let used = helpers_of(BYTES);
        assert!(used.len() > 10, "{used:?}");
        let unnamed: Vec<_> = used.iter().filter(|number| !named(number)).collect();
        assert!(unnamed.is_empty(), "helpers {unnamed:?} are in no row");
    }

    #[test]
    fn a_helper_is_unknown_if_the_verifier_says_so_and_not_if_its_arguments_are_wrong() {
        for unknown in [
            "invalid func unknown#999",
            "unknown func bpf_loop#181",
            "program of this type cannot use helper bpf_loop#181",
        ] {
            assert!(is_unknown(format!("0: (85) call {unknown}\nprocessed 1 insns").as_bytes()), "{unknown}");
        }
        assert!(!is_unknown(b"0: (85) call bpf_set_retval#187\nR1 is not a number\nprocessed 1 insns"));
    }

    #[test]
    fn what_is_missing_is_named_once_and_what_nobody_knows_is_not() {
        let missing = missing_by(|need| match need {
            Need::Helper("check_mtu" | "loop", ..) | Need::Atomics => Ok(false),
            Need::Helper("redirect", ..) => Err(io::Error::from_raw_os_error(libc::EPERM)),
            Need::Helper(..) | Need::MappedArrays | Need::XdpFrags => Ok(true),
        });
        let names: Vec<_> = missing.iter().map(Needed::to_string).collect();
        assert_eq!(
            names,
            ["bpf_check_mtu (5.12)", "bpf_loop (5.17)", "atomic operations that give the old value (5.12)"]
        );
    }
}
