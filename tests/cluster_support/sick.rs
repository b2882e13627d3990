//! A disk of which this process says what it does: a file system in user space (FUSE) with one file, which is the memory here, a
//! loop device over that file, and ext4 on it. So reads of some sectors can fail with EIO until those are written, as on a disk
//! that lost them and has spare ones, a flush can fail once, and all of it can hang. The kernel's own requests are the specification:
//! include/uapi/linux/fuse.h. Needs root.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::disks::{Mount, mount, mount_ext4, run};
use super::oracle::SECTOR;

/// The longest write that the kernel may send at once; and room for its headers.
const WRITE_MAX: usize = 128 << 10;
const ROOM: usize = WRITE_MAX + 4096;
const HEADER: usize = 40;
/// How often it is asked whether the disk still hangs.
const LOOK: Duration = Duration::from_millis(5);
/// Requests, by the names of fuse.h.
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
/// Each read and write comes here, none is answered from the page cache.
const FOPEN_DIRECT_IO: u32 = 1;
/// Writes of more than a page.
const FUSE_BIG_WRITES: u32 = 1 << 5;

struct State {
    bytes: Vec<u8>,
    /// Sectors that cannot be read before they are written.
    lost: BTreeSet<usize>,
    /// Reads that failed.
    refused: u64,
    /// So many flushes fail from now on.
    failing_flushes: u64,
    /// Nothing is answered.
    hangs: bool,
}

/// The disk, mounted. Declare it after the cluster whose node uses it, so that it goes first.
pub struct SickDisk {
    _ext4: Mount,
    _file: Mount,
    state: Arc<Mutex<State>>,
}

impl SickDisk {
    /// A disk of `bytes` that is well, mounted at `place`, which is made. `image` is a place for the file below it.
    pub fn mount(place: &Path, image: &Path, bytes: usize) -> SickDisk {
        let state = Arc::new(Mutex::new(State {
            bytes: vec![0; bytes],
            lost: BTreeSet::new(),
            refused: 0,
            failing_flushes: 0,
            hangs: false,
        }));
        let device = File::options().read(true).write(true).open("/dev/fuse");
        let device = device.unwrap_or_else(|e| panic!("/dev/fuse, for a disk that fails: {e}"));
        fs::create_dir_all(place).unwrap();
        File::create(image).unwrap();
        // The root of this file system is a file.
        let options = format!(
            "fd={},rootmode=100600,user_id=0,group_id=0",
            device.as_raw_fd()
        );
        mount("sick", image, "fuse", 0, &options);
        let file = Mount(image.into());
        let theirs = Arc::clone(&state);
        std::thread::spawn(move || serve(device, &theirs));
        let image = image.to_str().unwrap();
        run("mkfs.ext4", &["-q", "-F", image]);
        SickDisk {
            _ext4: mount_ext4(image, place),
            _file: file,
            state,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The sectors that hold this data can no longer be read, until they are written. Gives how many they are.
    pub fn lose(&self, data: &[u8]) -> usize {
        let wanted: BTreeSet<&[u8]> = data.chunks(SECTOR).collect();
        let mut state = self.state();
        let all = state.bytes.chunks(SECTOR).enumerate();
        let found: Vec<usize> = all
            .filter(|(_, bytes)| wanted.contains(bytes))
            .map(|(i, _)| i)
            .collect();
        state.lost.extend(&found);
        found.len()
    }

    /// Sectors that still cannot be read.
    pub fn lost(&self) -> usize {
        self.state().lost.len()
    }

    /// Reads that failed so far.
    pub fn refused(&self) -> u64 {
        self.state().refused
    }

    /// The next flush fails, those after it do not.
    pub fn fail_one_flush(&self) {
        self.state().failing_flushes = 1;
    }

    /// Nothing is answered from now on, until it is let go.
    pub fn hang(&self) {
        self.state().hangs = true;
    }

    /// It does all that it was asked meanwhile.
    pub fn let_go(&self) {
        self.state().hangs = false;
    }

    /// Whether it has.
    pub fn has_failed_it(&self) -> bool {
        self.state().failing_flushes == 0
    }
}

impl Drop for SickDisk {
    /// Or nobody could end a process that waits for it.
    fn drop(&mut self) {
        if let Ok(mut state) = self.state.lock() {
            state.hangs = false;
        }
    }
}

/// Answers the kernel until nobody uses the file any more.
fn serve(mut device: File, state: &Mutex<State>) {
    let mut request = vec![0; ROOM];
    loop {
        let len = match device.read(&mut request) {
            Ok(len) => len,
            // ENOENT: it was interrupted before we saw it.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::ENOENT)) => continue,
            Err(_) => return,
        };
        while state.lock().unwrap().hangs {
            std::thread::sleep(LOOK);
        }
        let Some(answer) = answer(&request[..len], &mut state.lock().unwrap()) else {
            continue;
        };
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(error) => (-error, Vec::new()),
        };
        let mut out = Vec::with_capacity(16 + body.len());
        out.extend(((16 + body.len()) as u32).to_le_bytes());
        out.extend(error.to_le_bytes());
        out.extend(&request[8..16]);
        out.extend(body);
        // ENOENT: whoever asked waits no more.
        let _ = device.write_all(&out);
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// What to say to a request; `None`: nothing.
fn answer(request: &[u8], state: &mut State) -> Option<Result<Vec<u8>, i32>> {
    let body = &request[HEADER..];
    // Both of READ and WRITE: the handle, where, how much.
    let place = || {
        let at = u64::from_le_bytes(body[8..16].try_into().unwrap()) as usize;
        (at, u32_at(body, 16) as usize)
    };
    Some(match u32_at(request, 4) {
        INIT => Ok(init()),
        GETATTR | SETATTR => Ok(attributes(state.bytes.len() as u64)),
        OPEN => {
            let mut out = vec![0; 16];
            out[8..12].copy_from_slice(&FOPEN_DIRECT_IO.to_le_bytes());
            Ok(out)
        }
        READ => {
            let (at, len) = place();
            let (at, end) = (at.min(state.bytes.len()), (at + len).min(state.bytes.len()));
            let sectors = at / SECTOR..end.div_ceil(SECTOR);
            if state.lost.range(sectors).next().is_some() {
                state.refused += 1;
                Err(libc::EIO)
            } else {
                Ok(state.bytes[at..end].to_vec())
            }
        }
        WRITE => {
            let (at, len) = place();
            let data = &body[40..40 + len];
            match state.bytes.get_mut(at..at + len) {
                Some(there) => {
                    there.copy_from_slice(data);
                    let whole = at.div_ceil(SECTOR)..(at + len) / SECTOR;
                    state.lost.retain(|s| !whole.contains(s));
                    let mut out = (len as u32).to_le_bytes().to_vec();
                    out.extend([0; 4]);
                    Ok(out)
                }
                None => Err(libc::ENOSPC),
            }
        }
        FSYNC if state.failing_flushes > 0 => {
            state.failing_flushes -= 1;
            Err(libc::EIO)
        }
        FSYNC | FLUSH | RELEASE => Ok(Vec::new()),
        FORGET | BATCH_FORGET | INTERRUPT => return None,
        _ => Err(libc::ENOSYS),
    })
}

fn init() -> Vec<u8> {
    let mut out = vec![0; 64];
    let words: [(usize, u32); 5] = [
        (0, 7),
        (4, 31),
        (8, WRITE_MAX as u32),
        (12, FUSE_BIG_WRITES),
        (20, WRITE_MAX as u32),
    ];
    for (at, word) in words {
        out[at..at + 4].copy_from_slice(&word.to_le_bytes());
    }
    // Requests that wait, and from how many on it is congested.
    out[16..18].copy_from_slice(&64_u16.to_le_bytes());
    out[18..20].copy_from_slice(&48_u16.to_le_bytes());
    out[24..28].copy_from_slice(&1_u32.to_le_bytes());
    out
}

/// A file of this size that anybody of root's may read and write.
fn attributes(size: u64) -> Vec<u8> {
    let mut out = vec![0; 104];
    let attributes = &mut out[16..];
    attributes[..8].copy_from_slice(&1_u64.to_le_bytes());
    attributes[8..16].copy_from_slice(&size.to_le_bytes());
    attributes[16..24].copy_from_slice(&(size / 512).to_le_bytes());
    attributes[60..64].copy_from_slice(&0o100_600_u32.to_le_bytes());
    attributes[64..68].copy_from_slice(&1_u32.to_le_bytes());
    attributes[80..84].copy_from_slice(&4096_u32.to_le_bytes());
    out
}
