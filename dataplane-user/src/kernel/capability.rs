//! What this process may do: the missing right is named before anything fails for want of it.

use std::{fmt, fs, io};

/// A capability that the agent needs, after capabilities(7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capability {
    /// To load programs and make maps.
    Bpf,
    /// To attach programs to interfaces, and to close sockets.
    NetAdmin,
    /// To load programs that compare packet pointers without the mitigations for strangers.
    Perfmon,
}

impl Capability {
    const NEEDED: [Self; 3] = [Self::Bpf, Self::NetAdmin, Self::Perfmon];

    /// The bit in the kernel's masks.
    const fn bit(self) -> u32 {
        match self {
            Self::NetAdmin => 12,
            Self::Perfmon => 38,
            Self::Bpf => 39,
        }
    }

    /// Whether `CAP_SYS_ADMIN` includes it.
    const fn in_sys_admin(self) -> bool {
        match self {
            Self::Bpf | Self::Perfmon => true,
            Self::NetAdmin => false,
        }
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bpf => "CAP_BPF",
            Self::NetAdmin => "CAP_NET_ADMIN",
            Self::Perfmon => "CAP_PERFMON",
        })
    }
}

const SYS_ADMIN: u32 = 21;

/// Rights are missing.
#[derive(Debug, thiserror::Error)]
pub enum CapabilityError {
    /// Some capabilities are not there.
    #[error(
        "this process lacks {}: run it as root, or in a container give it these capabilities (or `privileged`)",
        list(.0)
    )]
    Missing(Vec<Capability>),
    /// The kernel did not say.
    #[error("cannot read the capabilities of this process: {0}. Is /proc mounted?")]
    Unknown(#[from] io::Error),
}

fn list(capabilities: &[Capability]) -> String {
    capabilities.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Whether this process has all it needs.
///
/// # Errors
/// Names what is missing.
pub fn check() -> Result<(), CapabilityError> {
    let status = fs::read_to_string("/proc/self/status")?;
    let effective = effective(&status).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    match missing(effective) {
        missing if missing.is_empty() => Ok(()),
        missing => Err(CapabilityError::Missing(missing)),
    }
}

fn effective(status: &str) -> Option<u64> {
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(mask.trim(), 16).ok()
}

fn missing(effective: u64) -> Vec<Capability> {
    let has = |bit: u32| effective >> bit & 1 == 1;
    Capability::NEEDED
        .into_iter()
        .filter(|needed| !(has(needed.bit()) || needed.in_sys_admin() && has(SYS_ADMIN)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_lacks_nothing() {
        let status = "Name:\tx\nCapInh:\t0000000000000000\nCapEff:\t000001ffffffffff\n";
        assert!(missing(effective(status).unwrap()).is_empty());
    }

    #[test]
    fn an_ordinary_user_is_told_each_missing_capability() {
        let text = CapabilityError::Missing(missing(0)).to_string();
        assert!(text.contains("CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON"), "{text}");
    }

    #[test]
    fn the_administrator_of_old_may_do_bpf_but_not_the_network() {
        assert_eq!(missing(1 << SYS_ADMIN), [Capability::NetAdmin]);
    }
}
