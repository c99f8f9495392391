//! Whom a folder of manifests and its files are trusted from: who may write them decides over all Services of this node.

use std::ffi::CString;
use std::fs::Metadata;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

const OTHERS_WRITE: u32 = 0o002;
const GROUP_WRITES: u32 = 0o020;

/// Why a file is not trusted, or a folder: others than root and the agent's own user can write it.
pub(super) fn distrust(path: &Path, found: &Metadata) -> Option<String> {
    // SAFETY: the calls have no arguments and always succeed.
    let (user, group) = unsafe { (libc::geteuid(), libc::getegid()) };
    let reason = if ![0, user].contains(&found.uid()) {
        format!("it belongs to user {}", found.uid())
    } else if found.mode() & OTHERS_WRITE != 0 {
        "everybody can write it".to_owned()
    } else if found.mode() & GROUP_WRITES != 0 && ![0, group].contains(&found.gid()) {
        format!("group {} can write it", found.gid())
    } else {
        return None;
    };
    // A ConfigMap is mounted so, with a folder that everybody could write.
    if is_read_only(path) {
        return None;
    }
    Some(format!("is not trusted: {reason}, where only root may (chown root, chmod go-w)"))
}

/// Whether nobody can write there by this mount.
fn is_read_only(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return false };
    let mut found = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path ends with a zero, and the call fills in all of `found` if it succeeds.
    unsafe {
        libc::statvfs(path.as_ptr(), found.as_mut_ptr()) == 0
            && found.assume_init().f_flag & libc::ST_RDONLY != 0
    }
}
