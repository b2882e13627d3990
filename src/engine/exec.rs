//! One program takes another's place in the same process (execve(2)): what only the system can do about it.
//!
//! The call waits until all other threads have ended, and each of those until the kernel has done its requests in io_uring. So
//! when the new program begins, the old one writes nothing any more, to no disk and to no guest.

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use libc::{c_char, c_int, c_uint};

/// The first descriptor that is not standard input, output or error.
const FIRST: c_uint = 3;
/// Signals that tell a node something. They must not end a program that has not begun to listen to them.
const SIGNALS: [c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGUSR2];

/// From now on no descriptor that is open outlives a change of the program, but the three standard ones. Descriptors that
/// came over a socket were made without that.
///
/// # Errors
///
/// The system's.
pub fn keep_nothing() -> io::Result<()> {
    close_range(libc::CLOSE_RANGE_CLOEXEC)
}

/// Closes all descriptors but the three standard ones. For a program that has just begun and has opened none itself.
///
/// # Errors
///
/// The system's.
pub fn close_all() -> io::Result<()> {
    close_range(0)
}

fn close_range(flags: c_uint) -> io::Result<()> {
    // The call and not the C library's wrapper, which is younger (5.9 and 5.11 here, glibc 2.34).
    // SAFETY: it takes no pointers. Those that are closed belong to nobody: see `close_all`.
    match unsafe { libc::syscall(libc::SYS_close_range, FIRST, c_uint::MAX, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// This one does outlive it.
///
/// # Errors
///
/// The system's.
pub fn keep(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the command takes no pointer, and the descriptor is open.
    match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// A descriptor that the program before left open for this one.
///
/// # Errors
///
/// It is not open.
pub fn adopt(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < FIRST as RawFd {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the command takes no pointer; of a descriptor that is not open it says so.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and the program that opened it is no more.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Holds back the signals that tell a node something, for this thread, or lets them through. What is held back while the program
/// changes reaches the new one when it listens.
pub fn hold_signals(hold: bool) {
    let how = if hold {
        libc::SIG_BLOCK
    } else {
        libc::SIG_UNBLOCK
    };
    // SAFETY: the set is made before it is used, and both calls only read or write it. They fail for bad arguments only.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in SIGNALS {
            libc::sigaddset(&mut set, signal);
        }
        libc::pthread_sigmask(how, &set, std::ptr::null_mut());
    }
}

/// Runs `program` in this process's place, with all that was [kept](keep). Returns only if that fails, and then nothing has
/// changed.
pub fn exec(program: &Path, args: &[OsString], env: &[(OsString, OsString)]) -> io::Error {
    let text = |s: &OsStr| CString::new(s.as_bytes()).map_err(io::Error::from);
    let vars = env.iter().map(|(key, value)| {
        let mut var = key.clone().into_vec();
        var.push(b'=');
        var.extend(value.as_bytes());
        OsString::from_vec(var)
    });
    let made = || -> io::Result<(CString, Vec<CString>, Vec<CString>)> {
        Ok((
            text(program.as_os_str())?,
            args.iter().map(|a| text(a)).collect::<io::Result<_>>()?,
            vars.map(|v| text(&v)).collect::<io::Result<_>>()?,
        ))
    };
    let (program, args, vars) = match made() {
        Ok(made) => made,
        Err(e) => return e,
    };
    let pointers = |all: &[CString]| -> Vec<*const c_char> {
        let ends = std::iter::once(std::ptr::null());
        all.iter().map(|s| s.as_ptr()).chain(ends).collect()
    };
    let (argv, envp) = (pointers(&args), pointers(&vars));
    // SAFETY: both lists end with a null pointer and point to strings that live until the call fails.
    unsafe { libc::execve(program.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    io::Error::last_os_error()
}
