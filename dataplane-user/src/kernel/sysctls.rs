//! The settings of conntrack that kube-proxy makes: what goes to pods of this node passes the node's conntrack, and a table that is
//! full drops it. And what other settings of the node must not be.

use super::local_ports;
use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The kernel's settings.
pub const PROC_SYS: &str = "/proc/sys";
/// The size of conntrack's hash table.
const HASH_SIZE: &str = "/sys/module/nf_conntrack/parameters/hashsize";
/// Entries that share one bucket of it, as kube-proxy has it.
const ENTRIES_PER_BUCKET: u64 = 4;

/// What conntrack is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conntrack {
    /// The largest number of connections; 0: as it is.
    pub max: u64,
    /// Idle time of an established TCP connection; 0: as it is.
    pub established: Duration,
    /// The same where one end has closed; 0: as it is.
    pub close_wait: Duration,
}

impl Conntrack {
    /// As kube-proxy: so many connections per CPU, but no fewer than `min`; none per CPU leaves the number as it is.
    pub fn new(per_core: u32, min: u32, cpus: usize, established: Duration, close_wait: Duration) -> Self {
        let scaled = u64::from(per_core) * cpus as u64;
        let max = if per_core == 0 { 0 } else { scaled.max(min.into()) };
        Self { max, established, close_wait }
    }

    /// The settings, those that are to stay left out.
    fn settings(&self) -> Vec<Setting> {
        let netfilter = |name: &str| PathBuf::from(PROC_SYS).join("net/netfilter").join(name);
        let all = [
            Setting { path: netfilter("nf_conntrack_max"), value: self.max, at_least: true },
            Setting { path: HASH_SIZE.into(), value: self.max / ENTRIES_PER_BUCKET, at_least: true },
            Setting {
                path: netfilter("nf_conntrack_tcp_timeout_established"),
                value: self.established.as_secs(),
                at_least: false,
            },
            Setting {
                path: netfilter("nf_conntrack_tcp_timeout_close_wait"),
                value: self.close_wait.as_secs(),
                at_least: false,
            },
        ];
        all.into_iter().filter(|setting| setting.value != 0).collect()
    }

    /// Makes the settings, as far as this process may; each with what came of it. None where there is no conntrack.
    pub fn apply(&self) -> Vec<(Setting, Made)> {
        self.settings()
            .into_iter()
            .filter_map(|setting| {
                let made = setting.make();
                Some((setting, made?))
            })
            .collect()
    }
}

/// What came of a setting.
#[derive(Debug)]
pub enum Made {
    /// It was so already.
    Was,
    /// It was this before.
    Changed(u64),
    /// The kernel refuses; it is this.
    Refused(u64, io::Error),
}

impl Made {
    /// What came of it, for people.
    pub fn told(&self, setting: &Setting) -> String {
        match self {
            Self::Was => "is as it should be".to_owned(),
            Self::Changed(was) => format!("{was} before, {} now", setting.value),
            Self::Refused(is, error) => format!("is {is}, should be {}: {error}", setting.value),
        }
    }
}

/// A number below `/proc/sys` or `/sys`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    path: PathBuf,
    /// What it is to be.
    pub value: u64,
    /// More is as good.
    at_least: bool,
}

impl Setting {
    /// Its name for `sysctl -w`, or its file.
    pub fn name(&self) -> String {
        match self.path.strip_prefix(PROC_SYS) {
            Ok(name) => name.to_string_lossy().replace('/', "."),
            Err(_) => self.path.display().to_string(),
        }
    }

    /// `None` if there is no such setting.
    fn make(&self) -> Option<Made> {
        let is = number(&self.path)?;
        if is == self.value || self.at_least && is > self.value {
            return Some(Made::Was);
        }
        Some(match fs::write(&self.path, self.value.to_string()) {
            Ok(()) => Made::Changed(is),
            Err(error) => Made::Refused(is, error),
        })
    }
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The ports of a range that the node's own sockets may be given: the kernel's ephemeral ports, without those that are reserved.
/// `None` if there are none of them.
pub fn shared_with_sockets(range: &RangeInclusive<u16>) -> Option<RangeInclusive<u16>> {
    let read =
        |name: &str| fs::read_to_string(Path::new(PROC_SYS).join("net/ipv4").join(name)).unwrap_or_default();
    shared(range, &read("ip_local_port_range"), &read("ip_local_reserved_ports"))
}

fn shared(range: &RangeInclusive<u16>, ephemeral: &str, reserved: &str) -> Option<RangeInclusive<u16>> {
    let mut ends = ephemeral.split_whitespace().map(str::parse::<u16>);
    let ephemeral = ends.next()?.ok()?..=ends.next()?.ok()?;
    let reserved: Vec<_> = local_ports::ranges(reserved).collect();
    let may_be_given =
        |port: &u16| ephemeral.contains(port) && !reserved.iter().any(|range| range.contains(port));
    let first = range.clone().find(may_be_given)?;
    let last = range.clone().rev().find(may_be_given)?;
    Some(first..=last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conntrack(per_core: u32, min: u32, cpus: usize) -> Conntrack {
        let hour = Duration::from_secs(3_600);
        Conntrack::new(per_core, min, cpus, 24 * hour, hour)
    }

    #[test]
    fn conntrack_has_as_much_room_as_with_kube_proxy() {
        assert_eq!(conntrack(32_768, 131_072, 2).max, 131_072);
        assert_eq!(conntrack(32_768, 131_072, 8).max, 262_144);
        assert_eq!(conntrack(0, 131_072, 8).max, 0, "as it is");
        let names: Vec<_> = conntrack(0, 131_072, 8).settings().iter().map(Setting::name).collect();
        assert_eq!(
            names,
            [
                "net.netfilter.nf_conntrack_tcp_timeout_established",
                "net.netfilter.nf_conntrack_tcp_timeout_close_wait"
            ]
        );
    }

    #[test]
    fn a_setting_is_made_unless_it_is_good_enough_and_what_is_not_there_is_left() {
        let folder = std::env::temp_dir().join(format!("sysctls-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("max");
        let setting = |value, at_least| Setting { path: path.clone(), value, at_least };
        assert!(setting(7, true).make().is_none(), "there is none");
        fs::write(&path, "100\n").unwrap();
        assert!(matches!(setting(50, true).make(), Some(Made::Was)));
        assert!(matches!(setting(50, false).make(), Some(Made::Changed(100))));
        assert!(matches!(setting(200, true).make(), Some(Made::Changed(50))));
        assert_eq!(number(&path), Some(200));
        fs::remove_dir_all(folder).unwrap();
    }

    /// P12
    #[test]
    fn ports_that_sockets_may_get_are_found_unless_they_are_reserved() {
        let range = 61_000..=65_535;
        assert_eq!(shared(&range, "32768\t60999\n", "\n"), None);
        assert_eq!(shared(&range, "1024\t65535\n", "\n"), Some(61_000..=65_535));
        assert_eq!(shared(&range, "1024\t62000\n", "\n"), Some(61_000..=62_000));
        assert_eq!(shared(&range, "1024\t65535\n", "30000-32767,61000-65535\n"), None);
        assert_eq!(shared(&range, "1024\t65535\n", "61000-65534\n"), Some(65_535..=65_535));
        assert_eq!(shared(&range, "", ""), None, "nobody says");
    }
}
