//! Disks that fail, made of what every Linux has: a tmpfs is a disk that gets full, a loop device over memory that was sealed
//! is one that fails every write. And damage to the files of a copy, by docs/DISK-FORMAT.md alone.
//!
//! Mounts are made in a mount namespace of the test's own thread ([`own_mounts`]), which its nodes share: when they have
//! ended, however they did, nothing is left. Needs root.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::oracle::SECTOR;

const BLOCK: u64 = 4096;
/// The activity log in `meta`: its offset and its blocks.
const LOG: u64 = 2 * BLOCK;
const LOG_BLOCKS: u64 = 64;
const FILLER: &str = "filler";

/// Gives this thread, and the processes and threads that it starts, mounts that nobody else sees.
pub fn own_mounts() {
    // SAFETY: changes the calling thread's view of mounts, nothing in memory.
    let left = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    let why = std::io::Error::last_os_error();
    assert_eq!(left, 0, "a test that mounts disks must run as root: {why}");
    mount(
        "none",
        Path::new("/"),
        "",
        libc::MS_REC | libc::MS_PRIVATE,
        "",
    );
}

pub(super) fn mount(source: &str, target: &Path, kind: &str, flags: u64, options: &str) {
    let c = |text: &str| CString::new(text).unwrap();
    let (source, kind, options) = (c(source), c(kind), c(options));
    let place = c(target.to_str().unwrap());
    // SAFETY: four strings that live until it returns.
    let done = unsafe {
        libc::mount(
            source.as_ptr(),
            place.as_ptr(),
            kind.as_ptr(),
            flags,
            options.as_ptr().cast(),
        )
    };
    let why = std::io::Error::last_os_error();
    assert_eq!(done, 0, "cannot mount {}: {why}", target.display());
}

/// Something mounted. Dropped, it is out of sight at once and goes when the last file on it is closed.
pub(super) struct Mount(pub(super) PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let place = CString::new(self.0.to_str().unwrap()).unwrap();
        // SAFETY: a string that lives until it returns.
        unsafe { libc::umount2(place.as_ptr(), libc::MNT_DETACH) };
    }
}

/// A disk of a few megabytes in memory. Declare it after the cluster whose node uses it, so that it goes first.
pub struct SmallDisk(Mount);

impl SmallDisk {
    /// Mounts `bytes` at `place`, which is made.
    pub fn mount(place: &Path, bytes: u64) -> SmallDisk {
        fs::create_dir_all(place).unwrap();
        mount("small", place, "tmpfs", 0, &format!("size={bytes}"));
        SmallDisk(Mount(place.into()))
    }

    /// Makes it larger or smaller.
    pub fn resize(&self, bytes: u64) {
        let options = format!("size={bytes}");
        mount("small", &self.0.0, "tmpfs", libc::MS_REMOUNT, &options);
    }
}

/// A file system on a disk that can be made to fail, or to lose power.
pub struct BadDisk {
    mount: Option<Mount>,
    place: PathBuf,
    memory: File,
}

impl BadDisk {
    /// Makes an ext4 of `bytes` on a loop device over memory, and mounts it at `place`, which is made.
    pub fn mount(place: &Path, bytes: u64) -> BadDisk {
        let memory = memory("bad disk");
        memory.set_len(bytes).unwrap();
        run("mkfs.ext4", &["-q", "-F", &path_of(&memory)]);
        fs::create_dir_all(place).unwrap();
        BadDisk {
            mount: Some(mount_ext4(&path_of(&memory), place)),
            place: place.into(),
            memory,
        }
    }

    /// From now on every write and every flush fails with EIO; what was written reads as before.
    pub fn fail_writes(&self) {
        let fd = self.memory.as_raw_fd();
        super::eventually("the memory of a bad disk is sealed", || {
            // SAFETY: no memory is involved. EBUSY while a page is written.
            let done = unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_WRITE) };
            (done == 0).then_some(())
        });
    }

    /// Its machine lost power, and has it again: what is there is what the disk was given before it failed writes, and the file
    /// system looks into its journal. Nobody uses it.
    pub fn power_on(&mut self) {
        let kept = memory("bad disk, powered on");
        let bytes = self.memory.metadata().unwrap().len();
        kept.set_len(bytes).unwrap();
        let mut block = vec![0; 1 << 20];
        for at in (0..bytes).step_by(block.len()) {
            let len = block.len().min((bytes - at) as usize);
            self.memory.read_exact_at(&mut block[..len], at).unwrap();
            // A hole stays one.
            if block[..len].iter().any(|b| *b != 0) {
                kept.write_all_at(&block[..len], at).unwrap();
            }
        }
        self.mount = None;
        self.mount = Some(mount_ext4(&path_of(&kept), &self.place));
        self.memory = kept;
    }
}

/// A file in memory that can be sealed.
fn memory(name: &str) -> File {
    let name = CString::new(name).unwrap();
    // SAFETY: a string that lives until it returns; the descriptor is nobody else's.
    unsafe {
        let fd = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        File::from_raw_fd(fd)
    }
}

/// By which other programs open a file of ours.
fn path_of(file: &File) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
}

pub(super) fn mount_ext4(image: &str, place: &Path) -> Mount {
    let device = run("losetup", &["--find", "--show", image]);
    let device = device.trim();
    // A request that fails takes none with it that the kernel made one of with it.
    let queue = format!("/sys/block/{}/queue", device.trim_start_matches("/dev/"));
    fs::write(format!("{queue}/nomerges"), "2").unwrap();
    mount(device, place, "ext4", 0, "");
    // In use, so this only says that it goes with its last user.
    run("losetup", &["--detach", device]);
    Mount(place.into())
}

/// Nodes that this thread starts from now on take their machines for booted anew: another file lies over the kernel's name of its
/// boot. Needs [`own_mounts`].
pub fn boot_anew(dir: &Path) {
    let id = fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap();
    let file = dir.join(format!("boot-{}", id.trim()));
    fs::write(&file, id).unwrap();
    let kernels = Path::new("/proc/sys/kernel/random/boot_id");
    mount(file.to_str().unwrap(), kernels, "", libc::MS_BIND, "");
}

pub(super) fn run(program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("{program} must run (packages util-linux, e2fsprogs): {e}"));
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {err}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Takes what is free on the disk that holds `dir` but `left` bytes.
pub fn fill(dir: &Path, left: u64) {
    let file = File::create(dir.join(FILLER)).unwrap();
    let free = rustix::fs::statvfs(dir).unwrap();
    let take = (free.f_bavail * free.f_frsize).checked_sub(left);
    let flags = rustix::fs::FallocateFlags::empty();
    rustix::fs::fallocate(&file, flags, 0, take.expect("a larger disk")).unwrap();
}

/// Gives back what [`fill`] took.
pub fn make_space(dir: &Path) {
    fs::remove_file(dir.join(FILLER)).unwrap();
}

/// Overwrites a range of a file with bytes that were never there.
pub fn scribble(path: &Path, offset: u64, len: u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&vec![0xA5; len as usize], offset)
        .unwrap();
    file.sync_all().unwrap();
}

/// Whether what was scribbled there still is.
pub fn is_scribbled(path: &Path, offset: u64) -> bool {
    let mut byte = [0];
    let file = File::open(path).unwrap();
    file.read_exact_at(&mut byte, offset).unwrap();
    byte == [0xA5]
}

/// The place of one superblock: half 0 or 1.
pub fn superblock(half: u64) -> (u64, u64) {
    (half * BLOCK, BLOCK)
}

/// The place of the whole activity log.
pub fn log() -> (u64, u64) {
    (LOG, LOG_BLOCKS * BLOCK)
}

/// A block of the activity log.
pub struct LogBlock {
    /// Its offset in `meta`.
    pub offset: u64,
    pub sequence: u64,
    pub opening: u64,
}

/// The newest block of the log in a copy's `meta`.
pub fn last_log_block(meta: &Path) -> LogBlock {
    let file = File::open(meta).unwrap();
    let blocks = (0..LOG_BLOCKS).map(|i| {
        let offset = LOG + i * BLOCK;
        let mut header = [0; 32];
        file.read_exact_at(&mut header, offset).unwrap();
        let number = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().unwrap());
        LogBlock {
            offset,
            sequence: number(8),
            opening: number(16),
        }
    });
    let newest = blocks.max_by_key(|b| (b.opening, b.sequence));
    newest.expect("a log has blocks")
}

/// Makes the newest transaction one that power was lost in the middle of: its last sectors are as they were a lap of the
/// ring before.
pub fn tear_last_transaction(meta: &Path) {
    let file = File::options().read(true).write(true).open(meta).unwrap();
    let mut superblock = [0; SECTOR];
    file.read_exact_at(&mut superblock, 0).unwrap();
    let copy = &superblock[40..56];
    let block = last_log_block(meta);
    for i in 3..8 {
        let offset = block.offset + i * SECTOR as u64;
        let mut sector = [0; SECTOR];
        file.read_exact_at(&mut sector, offset).unwrap();
        // One transaction of its own, a lap ago, of the same opening.
        (sector[5], sector[6]) = (0, 1);
        sector[8..16].copy_from_slice(&(block.sequence - LOG_BLOCKS).to_le_bytes());
        let crc = crc32c::crc32c(copy);
        let crc = crc32c::crc32c_append(crc, &offset.to_le_bytes());
        let crc = crc32c::crc32c_append(crc, &sector[4..]);
        sector[..4].copy_from_slice(&crc.to_le_bytes());
        file.write_all_at(&sector, offset).unwrap();
    }
    file.sync_all().unwrap();
}

/// Cuts a file to this length.
pub fn truncate(path: &Path, len: u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_len(len).unwrap();
    file.sync_all().unwrap();
}
