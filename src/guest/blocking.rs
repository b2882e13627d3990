//! Calls on descriptors of the front-end's that must not block, and that the front-end can have block all the same:
//! O_NONBLOCK belongs to the open file description, which it holds, too. It takes the flag away and fills the counter of an
//! eventfd, or reads it before us, and the worker would wait for it, with the disks of every other machine. No system call
//! writes to an eventfd without waiting whatever that flag says (RWF_NOWAIT is refused). So such calls are watched: one that
//! does not return is interrupted by a signal, and its ring is given up.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError, Weak};
use std::time::Duration;

/// How often is looked. A call that is under way at two looks blocks.
const LOOK: Duration = Duration::from_millis(25);
/// Means nothing to anybody else here: out-of-band data on a socket, ignored unless handled.
const SIGNAL: libc::c_int = libc::SIGURG;

/// The calls of one thread.
struct Watched {
    thread: libc::pid_t,
    /// Begun and ended ones: odd while one is under way.
    calls: AtomicU64,
}

static ALL: Mutex<Vec<Weak<Watched>>> = Mutex::new(Vec::new());
static START: Once = Once::new();

thread_local! {
    static MINE: Arc<Watched> = enrol();
}

/// Makes a call on a descriptor that should not block. Whether it did, and was broken off.
#[inline]
pub(super) fn blocks(call: impl FnOnce() -> io::Result<usize>) -> bool {
    MINE.with(|mine| {
        let before = mine.calls.load(Ordering::Relaxed);
        mine.calls.store(before + 1, Ordering::Release);
        let result = call();
        mine.calls.store(before + 2, Ordering::Release);
        // What does not wait is not interrupted.
        result.is_err_and(|e| e.kind() == io::ErrorKind::Interrupted)
    })
}

fn enrol() -> Arc<Watched> {
    START.call_once(start);
    // SAFETY: takes no arguments and cannot fail.
    let thread = unsafe { libc::gettid() };
    let calls = AtomicU64::new(0);
    let mine = Arc::new(Watched { thread, calls });
    let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
    all.retain(|other| other.strong_count() > 0);
    all.push(Arc::downgrade(&mine));
    mine
}

fn start() {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: the structure is valid when zeroed, and the handler may run at any moment. Without SA_RESTART, so that the
    // interrupted call returns.
    let done = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(SIGNAL, &raw const action, std::ptr::null_mut()) == 0
    };
    let thread = std::thread::Builder::new().name("blocked calls".into());
    if let (true, Ok(_)) = (done, thread.spawn(watch)) {
        return;
    }
    log::error!("blocking calls are not watched: a hostile front-end can stop a worker");
}

fn watch() {
    let mut seen: HashMap<libc::pid_t, u64> = HashMap::new();
    loop {
        std::thread::sleep(LOOK);
        let all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        for watched in all.iter().filter_map(Weak::upgrade) {
            let calls = watched.calls.load(Ordering::Acquire);
            let before = seen.insert(watched.thread, calls);
            if calls % 2 == 1 && before == Some(calls) {
                // SAFETY: takes numbers only. A thread that ended meanwhile is not found, or is one of ours that goes on.
                unsafe {
                    libc::syscall(libc::SYS_tgkill, libc::getpid(), watched.thread, SIGNAL);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::{FromRawFd, IntoRawFd};

    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    #[test]
    fn a_read_or_write_that_waits_for_a_front_end_is_broken_off() {
        let event = EventFd::new(0).unwrap();
        // SAFETY: it was just given up by its only owner.
        let event = unsafe { File::from_raw_fd(event.into_raw_fd()) };
        let read = || (&event).read(&mut [0; 8]);
        let write = |n: u64| (&event).write(&n.to_ne_bytes());
        for _ in 0..3 {
            // Empty,
            assert!(blocks(read));
            // filled,
            assert!(!blocks(|| write(u64::MAX - 1)));
            // and full.
            assert!(blocks(|| write(1)));
            assert!(!blocks(read));
        }
    }
}
