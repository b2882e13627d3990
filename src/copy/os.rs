//! What the operating system is asked beyond std's files.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, StatxFlags};

use super::layout::BLOCK;
use crate::replication::ids::SECTOR;

/// `f_type` of tmpfs and ramfs (statfs(2)).
const TMPFS_MAGIC: u64 = 0x0102_1994;
const RAMFS_MAGIC: u64 = 0x8584_58f6;

/// Takes the exclusive lock of `file`'s open file description; false when another description has it.
///
/// flock(2) rather than F_OFD_SETLK: the same owner and the same end (the last reference to the description goes, which
/// requests in flight hold), and it needs no unsafe code. The two do not see each other: every party must use this one.
pub(super) fn lock(file: &File) -> io::Result<bool> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Bytes that an unprivileged writer may still take where `path` is.
pub(super) fn free_bytes(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Whether `file` lies in memory.
pub(super) fn in_memory(file: &File) -> io::Result<bool> {
    let kind = rustix::fs::fstatfs(file)?.f_type as u64;
    Ok(kind == TMPFS_MAGIC || kind == RAMFS_MAGIC)
}

/// Takes `len` bytes of disk for `file` from its start and makes it at least that long; what was not written reads as zeros.
/// Falls back to writing zeros beyond `written` where the file system cannot do it.
pub(super) fn reserve(file: &File, written: u64, len: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, len) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP) => {
            let zeros = vec![0; 1 << 20];
            let mut at = written;
            while at < len {
                let n = (len - at).min(zeros.len() as u64);
                file.write_all_at(&zeros[..n as usize], at)?;
                at += n;
            }
            Ok(())
        }
        Err(e) => Err(e.into()),
    }
}

/// Makes the entries of directory `dir` durable.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Whether `e` says that the disk, or a quota on it, is full.
pub(super) fn is_full(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// `path` opened with O_DIRECT and the alignment in bytes that memory then needs, when requests in whole sectors may go
/// through it; `None` when they may not. See "Alignment" in docs/DISK-FORMAT.md.
pub(super) fn open_direct(path: &Path) -> Option<(File, u32)> {
    let direct = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .ok()?;
    let stat = rustix::fs::statx(&direct, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
    match stat.filter(|s| s.stx_mask & StatxFlags::DIOALIGN.bits() != 0) {
        // Zero: the file system takes the flag and then cannot do it.
        Some(s) if s.stx_dio_offset_align == 0 => None,
        Some(s) if u64::from(s.stx_dio_offset_align) <= SECTOR => {
            Some((direct, s.stx_dio_mem_align.max(1)))
        }
        Some(_) => None,
        // Kernels before 6.1, and file systems that do not say: try. Memory as strictly as any disk wants it.
        None => reads_a_sector(&direct).then_some((direct, BLOCK as u32)),
    }
}

/// Whether `direct` takes a request of one sector at the second one; its file has at least two.
fn reads_a_sector(direct: &File) -> bool {
    let mut memory = vec![0; 2 * BLOCK as usize];
    let start = memory.as_ptr().align_offset(BLOCK as usize);
    let Some(sector) = memory.get_mut(start..start.saturating_add(SECTOR as usize)) else {
        return false;
    };
    direct.read_exact_at(sector, SECTOR).is_ok()
}
