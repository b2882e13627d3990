//! Guest memory that goes away under us. Its file is the front-end's, and QEMU's is not sealed: whoever holds it can cut it
//! short after it was mapped here, and then the next access to what is gone is a SIGBUS, of which a process dies, with the
//! disks of every other machine on this node. (System calls on such memory only fail.)
//!
//! So the signal is handled: where the lost page was, zeros are put in its place, private to this process, and the access is
//! made again. What it reads or writes means nothing any more, which is all the same to a machine without memory: the
//! memory is marked as [lost](Guard::is_lost), and its rings are given up at their next look. A fault anywhere else is
//! handed to whoever handled the signal before, which is how Rust tells of an overflown stack, or the default.
//!
//! The handler runs in the middle of any code of any thread. It takes no lock and allocates nothing: guards are found in a
//! list that only grows, and one that goes waits until no handler is looking.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

/// A place in the list. Never freed, used again when its guard has gone.
struct Node {
    guard: AtomicPtr<Watched>,
    next: AtomicPtr<Node>,
}

static HEAD: AtomicPtr<Node> = AtomicPtr::new(ptr::null_mut());
/// Handlers that are looking at the list.
static LOOKING: AtomicUsize = AtomicUsize::new(0);
static INSTALL: Once = Once::new();
/// Who handled the signal before. Written once, before the handler is in place.
static mut BEFORE: MaybeUninit<libc::sigaction> = MaybeUninit::zeroed();

#[derive(Debug)]
struct Watched {
    /// First address and the one behind the last, of each mapping.
    ranges: Box<[(usize, usize)]>,
    lost: AtomicBool,
}

/// Handles faults in some mappings while it lives. It must not outlive any of them.
#[derive(Debug)]
pub(super) struct Guard {
    watched: Box<Watched>,
    node: &'static Node,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Node")
    }
}

impl Guard {
    /// Guards mappings, each from its first address to the one behind its last.
    pub(super) fn new(ranges: impl IntoIterator<Item = (usize, usize)>) -> Guard {
        INSTALL.call_once(install);
        let watched = Box::new(Watched {
            ranges: ranges.into_iter().collect(),
            lost: AtomicBool::new(false),
        });
        let at = ptr::from_ref::<Watched>(&watched).cast_mut();
        let node = free_node(at);
        Guard { watched, node }
    }

    /// Whether a part of the memory has gone.
    #[inline]
    pub(super) fn is_lost(&self) -> bool {
        self.watched.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.node.guard.store(ptr::null_mut(), Ordering::SeqCst);
        // A handler that began before that store may have found this guard. It makes one system call a mapping.
        while LOOKING.load(Ordering::SeqCst) > 0 {
            std::hint::spin_loop();
        }
    }
}

fn nodes() -> impl Iterator<Item = &'static Node> {
    let after = |at: &AtomicPtr<Node>| {
        let next = at.load(Ordering::SeqCst);
        // SAFETY: nodes are made by `Box::leak` and never freed.
        unsafe { next.as_ref() }
    };
    std::iter::successors(after(&HEAD), move |node| after(&node.next))
}

/// Puts a guard into a place of the list: one that is free, or a new one.
fn free_node(guard: *mut Watched) -> &'static Node {
    let none = ptr::null_mut();
    let taken = nodes().find(|node| {
        let swapped =
            (node.guard).compare_exchange(none, guard, Ordering::SeqCst, Ordering::SeqCst);
        swapped.is_ok()
    });
    taken.unwrap_or_else(|| {
        let node: &'static Node = Box::leak(Box::new(Node {
            guard: AtomicPtr::new(guard),
            next: AtomicPtr::new(ptr::null_mut()),
        }));
        let at = ptr::from_ref(node).cast_mut();
        let mut first = HEAD.load(Ordering::SeqCst);
        loop {
            node.next.store(first, Ordering::SeqCst);
            match HEAD.compare_exchange(first, at, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return node,
                Err(other) => first = other,
            }
        }
    })
}

fn install() {
    // SAFETY: the structure is valid when zeroed. `BEFORE` is written here only, once, and read by the handler, which the
    // second call puts in place; the flags are those that the handler is written for.
    let done = unsafe {
        let before = (&raw mut BEFORE).cast::<libc::sigaction>();
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_fault as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, ptr::null(), before) == 0
            && libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) == 0
    };
    if !done {
        // Only invalid arguments do this.
        log::error!(
            "SIGBUS is not handled: a front-end that cuts its memory short ends this process"
        );
    }
}

extern "C" fn on_fault(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid structure with an address for this signal; `errno` belongs to this thread, whose
    // code was interrupted and must find it as it was.
    let (addr, errno) = unsafe { ((*info).si_addr() as usize, *libc::__errno_location()) };
    LOOKING.fetch_add(1, Ordering::SeqCst);
    let mut handled = false;
    for node in nodes() {
        // SAFETY: a guard that goes takes itself out of its node and then waits for `LOOKING`.
        let Some(watched) = (unsafe { node.guard.load(Ordering::SeqCst).as_ref() }) else {
            continue;
        };
        for (start, end) in &watched.ranges {
            if (*start..*end).contains(&addr) {
                handled = handled || put_zeros(addr, *start, *end);
                watched.lost.store(true, Ordering::Relaxed);
            }
        }
    }
    LOOKING.fetch_sub(1, Ordering::SeqCst);
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
    if !handled {
        pass_on(signal, info, context);
    }
}

/// Replaces a mapping by zeros, from the page of `addr` to its end: the file may be cut anywhere. All of it when that is not
/// possible, as with huge pages.
fn put_zeros(addr: usize, start: usize, end: usize) -> bool {
    // SAFETY: asks a constant of the system.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
    let from = (addr - addr % page).max(start);
    [from, start].into_iter().any(|from| {
        // SAFETY: the range is a part of a mapping that belongs to a guard and outlives it. Those who use it know raw
        // pointers only, and take whatever bytes they find.
        let at = unsafe {
            libc::mmap(
                from as *mut c_void,
                end - from,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        at != libc::MAP_FAILED
    })
}

/// Does what would have been done without this handler.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: `BEFORE` was written before this handler was in place. What it names was installed for this signal, with the
    // arguments that its flags say.
    unsafe {
        let before = (&raw const BEFORE).cast::<libc::sigaction>().read();
        match before.sa_sigaction {
            libc::SIG_DFL | libc::SIG_IGN => {
                // The instruction runs again, and its fault ends the process.
                let mut default: libc::sigaction = std::mem::zeroed();
                default.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &raw const default, ptr::null_mut());
            }
            handler if before.sa_flags & libc::SA_SIGINFO != 0 => {
                type Full = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut c_void);
                std::mem::transmute::<usize, Full>(handler)(signal, info, context);
            }
            handler => {
                type Short = extern "C" fn(libc::c_int);
                std::mem::transmute::<usize, Short>(handler)(signal);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::process::ExitStatusExt;

    use rustix::fs::MemfdFlags;
    use vm_memory::{FileOffset, MmapRegion};

    use super::*;

    const PAGE: usize = 4096;

    fn mapped(pages: usize) -> (File, MmapRegion<()>) {
        let file: File = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC)
            .unwrap()
            .into();
        file.set_len((pages * PAGE) as u64).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let map = MmapRegion::from_file(offset, pages * PAGE).unwrap();
        (file, map)
    }

    fn range(map: &MmapRegion<()>) -> (usize, usize) {
        (map.as_ptr() as usize, map.as_ptr() as usize + map.size())
    }

    #[test]
    fn what_was_cut_off_reads_as_zeros_and_the_rest_as_it_is() {
        let (file, map) = mapped(4);
        let (_other_file, other) = mapped(1);
        let guards = [
            Guard::new([range(&other), range(&map)]),
            // A second ring of the same machine.
            Guard::new([range(&map)]),
            Guard::new([range(&other)]),
        ];
        let byte = |page: usize| map.as_ptr().wrapping_add(page * PAGE + 7);
        for page in 0..4 {
            // SAFETY: mapped.
            unsafe { byte(page).write_volatile(9) };
        }
        file.set_len(2 * PAGE as u64).unwrap();
        // SAFETY: mapped, and guarded.
        let read = |page| unsafe { byte(page).read_volatile() };
        assert_eq!((read(0), read(1)), (9, 9));
        assert!(!guards.iter().any(Guard::is_lost));
        assert_eq!((read(3), read(2)), (0, 0));
        // SAFETY: as above.
        unsafe { byte(2).write_volatile(5) };
        assert_eq!((read(2), read(1)), (5, 9));
        assert_eq!(guards.each_ref().map(Guard::is_lost), [true, true, false]);
    }

    #[test]
    fn guards_come_and_go_on_many_threads() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let (file, map) = mapped(2);
                        let guard = Guard::new([range(&map)]);
                        file.set_len(0).unwrap();
                        // SAFETY: mapped, and guarded.
                        let byte = unsafe { map.as_ptr().read_volatile() };
                        assert!(byte == 0 && guard.is_lost());
                    }
                });
            }
        });
        // Places are used again.
        assert!(nodes().count() < 100);
    }

    #[test]
    fn a_fault_of_nobody_ends_the_process() {
        const CHILD: &str = "LOCKSTEP_TEST_FAULT";
        if std::env::var_os(CHILD).is_some() {
            let (_file, guarded) = mapped(1);
            let _guard = Guard::new([range(&guarded)]);
            let (file, map) = mapped(1);
            file.set_len(0).unwrap();
            // SAFETY: not safe: it ends this process, which does nothing else.
            unsafe { map.as_ptr().read_volatile() };
            return;
        }
        let name = "guest::fault::tests::a_fault_of_nobody_ends_the_process";
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name])
            .env(CHILD, "1")
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
    }
}
