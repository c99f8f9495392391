//! The eBPF object: its maps, new or found pinned, and its programs.
//!
//! A map that is pinned already is used as it is: its flows go on (C3). One of another shape is never touched.
#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "aya's enums are not ours and name much that is never used here"
)]

use super::bpf::MapFd;
use super::clock;
use super::enlarge::{self, Enlarged};
use super::maps::map_type;
use super::pins::{PinError, Pins};
use crate::config::MapSize;
use crate::memory;
use aya::maps::{Map, MapData};
use aya::programs::{Program, ProgramError};
use aya::{Ebpf, EbpfError, EbpfLoader};
use dataplane_common::tables::{self, Table as _};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// The programs, compiled by the build script.
pub(super) static BYTES: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/portolan-ebpf.o"));

/// The compiler and the linker that made them.
pub const TOOLCHAIN: &str = env!("PORTOLAN_EBPF_TOOLCHAIN");

/// aya's map of log records.
const LOG_MAP: &str = "AYA_LOGS";
/// Its size when nothing is logged: the least there can be.
const NO_LOG: u32 = 4096;

/// What went wrong with the object.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// A pinned map is not what the programs expect.
    #[error(
        "the pinned map {path} has another layout than this version's: if nothing else uses that folder, run `portolan \
         cleanup` (connections in progress break) or choose another --bpffs"
    )]
    Shape {
        /// The pin.
        path: PathBuf,
    },
    /// The kernel refused a right.
    #[error(
        "the kernel refuses to load {what}: {source}. Is CAP_BPF missing, or is the kernel locked down (lockdown=confidentiality, \
         kernel.unprivileged_bpf_disabled, a seccomp profile)?"
    )]
    Refused {
        /// What was loaded.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The maps or the object itself.
    #[error("cannot make the maps: {0}")]
    Maps(#[source] Box<EbpfError>),
    /// The pin folder.
    #[error(transparent)]
    Pins(#[from] PinError),
    /// A map could not be given more room.
    #[error("cannot give map {name} more room: {source}. Start without --map-size and --max-flows for it")]
    Enlarge {
        /// The map.
        name: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// One program.
    #[error("cannot load the program {name}: {source}")]
    Program {
        /// Its name.
        name: String,
        /// The kernel's answer, with what the verifier said.
        source: Box<ProgramError>,
    },
    /// The object lacks something: a fault of the build.
    #[error("the eBPF object has no `{0}`: this build of portolan is broken")]
    Missing(String),
    /// After loading, a pin leads elsewhere.
    #[error(
        "the pin {path} does not lead to the map that the programs use: does something else write that folder?"
    )]
    Astray {
        /// The pin.
        path: PathBuf,
    },
}

/// How often a program is loaded whose verification a signal cuts short: the kernel then answers `EAGAIN`.
const LOAD_TRIES: usize = 10;

/// One try to load a program; the error is that it is of a type that none of ours has.
fn load(program: &mut Program) -> Result<Result<(), ProgramError>, ObjectError> {
    match program {
        Program::Xdp(program) => Ok(program.load()),
        Program::SchedClassifier(program) => Ok(program.load()),
        Program::CgroupSockAddr(program) => Ok(program.load()),
        Program::CgroupSock(program) => Ok(program.load()),
        _ => Err(ObjectError::Missing("a program of the right type".to_owned())),
    }
}

fn was_interrupted(error: &ProgramError) -> bool {
    matches!(error, ProgramError::LoadError { io_error, .. } if io_error.raw_os_error() == Some(libc::EAGAIN))
}

/// How the object is loaded.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options<'a> {
    /// Where maps are pinned and found; without, they end with this process.
    pub pins: Option<&'a Pins>,
    /// Sizes that differ from the defaults.
    pub sizes: &'a [MapSize],
    /// Whether programs tell why they drop or refuse packets. Off, it costs them nothing.
    pub log: bool,
    /// Where the tables are found that programs only read ([`tables::READ_ONLY`]), if `pins` is none: all else is made anew and
    /// ends with the object, so that its programs change nothing for those that serve.
    pub reads: Option<&'a Pins>,
}

/// Records that the programs log; readable when there are some.
pub struct ProgramLog(aya_log::EbpfLogger<&'static dyn log::Log>);

impl ProgramLog {
    /// Passes on all records that there are.
    pub fn flush(&mut self) {
        self.0.flush();
    }
}

impl AsRawFd for ProgramLog {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// The programs that are loaded, by name, in the order of loading; clones share them, and see what is loaded later.
#[derive(Clone, Debug, Default)]
pub struct Programs(Arc<Mutex<Vec<Loaded>>>);

#[derive(Debug)]
struct Loaded {
    name: Arc<str>,
    program: OwnedFd,
}

impl Programs {
    fn add(&self, name: &str, program: OwnedFd) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Loaded { name: name.into(), program });
    }

    /// What `look` finds out of each; programs of which it finds nothing are left out.
    pub fn each<T>(&self, look: impl Fn(&Arc<str>, BorrowedFd<'_>) -> Option<T>) -> Vec<T> {
        let programs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        programs.iter().filter_map(|loaded| look(&loaded.name, loaded.program.as_fd())).collect()
    }
}

/// The object, loaded.
#[derive(Debug)]
pub struct Object {
    ebpf: Ebpf,
    programs: Programs,
    /// Maps that got more room just now.
    enlarged: Vec<Enlarged>,
}

impl Object {
    /// Makes or opens the maps. No program is loaded yet.
    ///
    /// # Errors
    /// If a pinned map has another shape, or the kernel refuses.
    pub fn open(options: &Options<'_>) -> Result<Self, ObjectError> {
        /// `Level::Debug` of aya-log, and a number below all levels.
        const LEVELS: [u8; 2] = [0, 4];
        let mut enlarged = Vec::new();
        let tick_length = clock::own_shift();
        let rooms = RINGS.map(|(name, capacity, _)| room(options, name, capacity));
        let mut loader = EbpfLoader::new();
        for ((.., global), room) in RINGS.iter().zip(&rooms) {
            loader.override_global(global, room, true);
        }
        loader.override_global("TICK_LENGTH", &tick_length, true);
        // No program refers to the kernel's types.
        loader.btf(None);
        loader.override_global(aya_log::LEVEL, &LEVELS[usize::from(options.log)], false);
        if !options.log {
            loader.map_max_entries(LOG_MAP, NO_LOG);
        }
        for size in options.sizes {
            loader.map_max_entries(size.map, size.entries);
        }
        for &(name, kind, capacity) in tables::ALL {
            let Some(pins) = options.pins else {
                if let Some(pins) = options.reads.filter(|_| tables::READ_ONLY.contains(&name)) {
                    let path = pins.map(name);
                    let found = MapFd::open(&path).map_err(|source| ObjectError::Refused {
                        what: format!("the pinned map {name}"),
                        source,
                    })?;
                    let entries = found_entries(&found, name, map_type(kind), &path)?;
                    loader.map_max_entries(name, entries as u32);
                    loader.map_pin_path(name, path);
                }
                continue;
            };
            let path = pins.map(name);
            let Ok(found) = MapFd::open(&path) else {
                loader.map_pin_path(name, path);
                continue;
            };
            let wanted = options.sizes.iter().rfind(|size| size.map == name);
            let wanted = wanted.map_or(capacity, |size| size.entries as usize);
            let entries = found_entries(&found, name, map_type(kind), &path)?;
            // What an attempt to enlarge it that was cut short left.
            pins.remove(&enlarge::new_pin(pins, name))?;
            if wanted > entries {
                let path = enlarge::new_pin(pins, name);
                loader.map_pin_path(name, path);
                enlarged.push(Enlarged::new(name, found));
                continue;
            }
            if wanted < entries {
                tracing::info!("map {name} keeps its {entries} entries, more than the {wanted} asked for");
                loader.map_max_entries(name, entries as u32);
            }
            loader.map_pin_path(name, path);
        }
        let ebpf = loader.load(BYTES).map_err(refused_maps)?;
        let object = Self { ebpf, programs: Programs::default(), enlarged };
        if let Some(pins) = options.pins {
            object.enlarged.iter().try_for_each(|map| map.take_over(pins))?;
            object.verify(pins)?;
        }
        // Loading takes several times the memory of everything after it.
        memory::give_back();
        memory::let_go(BYTES);
        Ok(object)
    }

    /// Once the new programs are attached: copies what the old ones wrote to maps that got more room.
    pub fn carry_over(&mut self, pins: &Pins) {
        std::mem::take(&mut self.enlarged).iter().for_each(|map| map.carry_over(pins));
    }

    /// Each pin leads to the map that the programs will use.
    fn verify(&self, pins: &Pins) -> Result<(), ObjectError> {
        for (name, ..) in tables::ALL {
            let path = pins.map(name);
            let Some(map) = self.ebpf.map(name) else { continue };
            let ours = data(map).and_then(|map| map.info().ok()).map(|info| info.id());
            let pinned = MapFd::open(&path).ok().map(|map| map.shape().id);
            if ours != pinned {
                return Err(ObjectError::Astray { path });
            }
        }
        Ok(())
    }

    /// Loads a program, if that has not been done.
    ///
    /// # Errors
    /// If the verifier or the kernel refuses it.
    pub fn load(&mut self, name: &str) -> Result<(), ObjectError> {
        let program = self.ebpf.program_mut(name).ok_or_else(|| ObjectError::Missing(name.to_owned()))?;
        if program.fd().is_ok() {
            return Ok(());
        }
        let mut loaded = load(program)?;
        for _ in 1..LOAD_TRIES {
            if !loaded.as_ref().is_err_and(was_interrupted) {
                break;
            }
            loaded = load(program)?;
        }
        loaded.map_err(|source| match source {
            ProgramError::LoadError { io_error, .. } if is_denial(&io_error) => {
                ObjectError::Refused { what: format!("the program {name}"), source: io_error }
            }
            source => ObjectError::Program { name: name.to_owned(), source: Box::new(source) },
        })?;
        // Without a descriptor of its own a program is merely not counted.
        if let Ok(fd) = self.program(name).map(|program| program.try_clone_to_owned())
            && let Ok(fd) = fd
        {
            self.programs.add(name, fd);
        }
        Ok(())
    }

    /// The programs that are loaded, now and later.
    pub fn programs(&self) -> Programs {
        self.programs.clone()
    }

    /// Whether the object has this program at all.
    pub fn has(&self, name: &str) -> bool {
        self.ebpf.program(name).is_some()
    }

    /// A program that was loaded.
    ///
    /// # Errors
    /// If it was not, or there is none.
    pub fn program(&self, name: &str) -> Result<BorrowedFd<'_>, ObjectError> {
        let program = self.ebpf.program(name).ok_or_else(|| ObjectError::Missing(name.to_owned()))?;
        let fd = program.fd();
        Ok(fd
            .map_err(|source| ObjectError::Program { name: name.to_owned(), source: Box::new(source) })?
            .as_fd())
    }

    /// The kernel's id of a program that was loaded, and how many instructions the verifier went through.
    ///
    /// # Errors
    /// If it was not loaded, or there is none.
    pub fn program_id(&self, name: &str) -> Result<(u32, Option<u32>), ObjectError> {
        let program = self.ebpf.program(name).ok_or_else(|| ObjectError::Missing(name.to_owned()))?;
        let info = program
            .info()
            .map_err(|source| ObjectError::Program { name: name.to_owned(), source: Box::new(source) })?;
        Ok((info.id(), info.verified_instruction_count()))
    }

    /// Bytes of machine code that a loaded program became.
    ///
    /// # Errors
    /// If it was not loaded, or there is none.
    pub fn jit_size(&self, name: &str) -> Result<u32, ObjectError> {
        let program = self.ebpf.program(name).ok_or_else(|| ObjectError::Missing(name.to_owned()))?;
        let info = program
            .info()
            .map_err(|source| ObjectError::Program { name: name.to_owned(), source: Box::new(source) })?;
        Ok(info.size_jitted())
    }

    /// A map of the object, by a descriptor of its own.
    ///
    /// # Errors
    /// If there is none, or no descriptor is left.
    pub fn map(&self, name: &str) -> Result<OwnedFd, ObjectError> {
        let missing = || ObjectError::Missing(name.to_owned());
        let map = self.ebpf.map(name).and_then(data).ok_or_else(missing)?;
        map.fd().as_fd().try_clone_to_owned().map_err(|_| missing())
    }

    /// Where the programs' log records arrive.
    ///
    /// # Errors
    /// If the object logs nothing.
    pub fn logger(&mut self) -> Result<ProgramLog, aya_log::Error> {
        aya_log::EbpfLogger::init(&mut self.ebpf).map(ProgramLog)
    }

    /// The tc program of this name, for attaching by clsact.
    pub(super) fn classifier(
        &mut self,
        name: &str,
    ) -> Result<&mut aya::programs::SchedClassifier, ObjectError> {
        let missing = || ObjectError::Missing(name.to_owned());
        let program = self.ebpf.program_mut(name).ok_or_else(missing)?;
        program.try_into().map_err(|_| missing())
    }
}

/// The rings of names: their maps, and the number in the programs that says how many slots they have.
const RINGS: [(&str, usize, &str); 2] = [
    (tables::HalfOpen::NAME, tables::HalfOpen::CAPACITY, "HALF_OPEN_ROOM"),
    (tables::Closing::NAME, tables::Closing::CAPACITY, "CLOSING_ROOM"),
];

/// How many entries a map will have: what is asked for, or what it has already if that is more.
fn room(options: &Options<'_>, name: &str, capacity: usize) -> u32 {
    let wanted = options.sizes.iter().rfind(|size| size.map == name).map(|size| size.entries);
    let wanted = wanted.unwrap_or(u32::try_from(capacity).unwrap_or(u32::MAX));
    let found = options.pins.and_then(|pins| MapFd::open(&pins.map(name)).ok());
    let found = found.map_or(0, |map| map.shape().max_entries);
    wanted.max(u32::try_from(found).unwrap_or(u32::MAX))
}

/// Checks a map that is pinned already, and says how many entries it has.
fn found_entries(found: &MapFd, name: &str, map_type: u32, path: &Path) -> Result<usize, ObjectError> {
    let shape = found.shape();
    let sizes = tables::SIZES.iter().find(|(table, ..)| *table == name);
    let fits = shape.map_type == map_type
        && sizes.is_some_and(|(_, key, value)| shape.key_size == *key && shape.value_size == *value);
    if fits { Ok(shape.max_entries) } else { Err(ObjectError::Shape { path: path.to_owned() }) }
}

fn data(map: &Map) -> Option<&MapData> {
    match map {
        Map::Array(data)
        | Map::PerCpuArray(data)
        | Map::HashMap(data)
        | Map::LruHashMap(data)
        | Map::PerCpuHashMap(data)
        | Map::PerCpuLruHashMap(data)
        | Map::LpmTrie(data)
        | Map::SkStorage(data)
        | Map::RingBuf(data) => Some(data),
        _ => None,
    }
}

fn is_denial(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EPERM)
}

fn refused_maps(error: EbpfError) -> ObjectError {
    // The kernel's answer lies at the end of a chain of errors.
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(this) = cause {
        if let Some(answer) = this.downcast_ref::<io::Error>()
            && is_denial(answer)
        {
            let source = io::Error::from_raw_os_error(answer.raw_os_error().unwrap_or(libc::EPERM));
            return ObjectError::Refused { what: "the maps".to_owned(), source };
        }
        cause = this.source();
    }
    ObjectError::Maps(Box::new(error))
}
