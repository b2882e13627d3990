//! The size that the guest is shown, and how it learns of a larger one: the engine raises it here, the control thread sees
//! that and tells the front-end over the channel that SET_BACKEND_REQ_FD brought.
//!
//! The message layer (`vhost`) takes that channel and can send nothing on it that says "the configuration changed". So the
//! descriptor is looked at before the layer reads the message: a peek gives us one of our own (unix(7): descriptors are
//! duplicated for every receiver of the bytes they came with).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::request::SECTOR_SIZE;

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG as it travels: request 2, version 1 and no wish for an answer, no payload. QEMU holds
/// its virtual machine still while it waits for *our* answers, so asking it for one here would stop both for good.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];
/// Bytes of a vhost-user header: what descriptors come with.
const HEADER: usize = 12;
/// Descriptors that a front-end may send with one message (VHOST_USER_MAX_FDS is 8).
const FDS_MAX: usize = 8;

/// A volume's size as its guest sees it. Clones share it.
#[derive(Debug, Clone)]
pub struct Capacity(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    sectors: AtomicU64,
    /// Wakes the control thread.
    changed: EventFd,
}

impl Capacity {
    /// Of a volume of `size` bytes.
    pub(super) fn new(size: u64) -> io::Result<Self> {
        Ok(Self(Arc::new(Shared {
            sectors: AtomicU64::new(size / SECTOR_SIZE),
            changed: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        })))
    }

    /// In sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.0.sectors.load(Ordering::Acquire)
    }

    /// The volume has `size` bytes now, and requests up to there are taken; a smaller size is of long ago. Blocks nobody.
    pub fn grow(&self, size: u64) {
        self.0
            .sectors
            .fetch_max(size / SECTOR_SIZE, Ordering::AcqRel);
        // Refused only when the counter is full, and then the thread is awake.
        let _ = self.0.changed.write(1);
    }

    /// Readable after a change.
    pub(super) fn event(&self) -> i32 {
        self.0.changed.as_raw_fd()
    }

    /// Whether it changed since this was asked last.
    pub(super) fn take_change(&self) -> bool {
        self.0.changed.read().is_ok()
    }
}

/// The way to the front-end for what it has not asked for.
#[derive(Debug)]
pub(super) struct Channel(OwnedFd);

impl Channel {
    /// One more descriptor for it.
    pub(super) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }

    /// Has the front-end read the configuration again.
    ///
    /// # Errors
    ///
    /// It hung up, or leaves so much unread that nothing fits any more.
    pub(super) fn config_changed(&self) -> io::Result<()> {
        let mut bytes = [0; HEADER];
        for (out, word) in bytes.chunks_exact_mut(4).zip(CONFIG_CHANGE) {
            out.copy_from_slice(&word.to_ne_bytes());
        }
        // SAFETY: the buffer is readable for its length, the descriptor is open.
        let sent = unsafe {
            libc::send(
                self.0.as_raw_fd(),
                bytes.as_ptr().cast(),
                bytes.len(),
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        };
        match usize::try_from(sent) {
            Ok(HEADER) => Ok(()),
            Ok(_) => Err(io::ErrorKind::WriteZero.into()),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }
}

/// Space for the control message of [`FDS_MAX`] descriptors, aligned as the kernel's header wants it.
#[repr(C, align(8))]
struct Control([u8; 16 + 4 * FDS_MAX]);

/// The first descriptor that comes with the message that is to be read next on `socket`, duplicated; the message and its own
/// descriptors stay where they are. `None` when none comes with it.
///
/// # Errors
///
/// The socket cannot be read, or the process has no descriptors left.
pub(super) fn peek_channel(socket: BorrowedFd<'_>) -> io::Result<Option<Channel>> {
    let mut header = [0u8; HEADER];
    let mut control = Control([0; 16 + 4 * FDS_MAX]);
    let mut iov = libc::iovec {
        iov_base: header.as_mut_ptr().cast(),
        iov_len: header.len(),
    };
    // SAFETY: all zeros is a valid `msghdr`: null pointers with lengths of zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = control.0.len();
    // SAFETY: the header and both buffers it names are alive and writable for the lengths given.
    let read = unsafe {
        libc::recvmsg(
            socket.as_raw_fd(),
            &mut message,
            libc::MSG_PEEK | libc::MSG_CMSG_CLOEXEC,
        )
    };
    if read < 0 {
        return Err(io::Error::last_os_error());
    }
    // All of them are ours now: those that are not returned are closed here.
    let mut found = received(&message).into_iter();
    Ok(found.next().map(Channel))
}

/// The descriptors in the control messages that the kernel filled in.
fn received(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut all = Vec::new();
    // SAFETY: the kernel wrote whole control messages of `msg_controllen` bytes in all; the macros stay within them.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(message);
        while let Some(head) = at.as_ref() {
            if (head.cmsg_level, head.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let data = libc::CMSG_DATA(at).cast::<libc::c_int>();
                let bytes = head.cmsg_len - libc::CMSG_LEN(0) as usize;
                for i in 0..bytes / size_of::<libc::c_int>() {
                    all.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                }
            }
            at = libc::CMSG_NXTHDR(message, at);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    use super::*;

    #[test]
    fn a_peeked_descriptor_is_a_second_one_and_the_message_stays() {
        // Given a message with two descriptors, the first of which is one end of a channel,
        let (front, back) = UnixStream::pair().unwrap();
        let (mut mine, theirs) = UnixStream::pair().unwrap();
        let header = [21u8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
        let sent = front.send_with_fds(&[&header[..]], &[theirs.as_raw_fd(), front.as_raw_fd()]);
        assert_eq!(sent.unwrap(), HEADER);
        drop(theirs);
        // when it is peeked, then read by somebody else who closes what came with it,
        let channel = peek_channel(back.as_fd()).unwrap().unwrap();
        let mut bytes = [0u8; HEADER];
        let mut fds = [0; 2];
        let mut iov = [libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        }];
        // SAFETY: the buffer is writable for its length.
        let (read, count) = unsafe { back.recv_with_fds(&mut iov, &mut fds) }.unwrap();
        assert_eq!((read, count, bytes), (HEADER, 2, header));
        for fd in fds {
            // SAFETY: they were just received, and nobody else owns them.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
        // then the peeked one still works, and says that nobody waits for an answer.
        channel.config_changed().unwrap();
        let mut told = [0; HEADER];
        mine.read_exact(&mut told).unwrap();
        let words: Vec<u32> = told
            .chunks_exact(4)
            .map(|w| u32::from_ne_bytes(w.try_into().unwrap()))
            .collect();
        assert_eq!(words, [2, 1, 0]);
        drop(channel);
        assert_eq!(mine.read(&mut told).unwrap(), 0, "no other is left open");
    }

    #[test]
    fn without_a_descriptor_there_is_no_channel_and_a_front_end_that_hung_up_is_an_error() {
        let (mut front, back) = UnixStream::pair().unwrap();
        front.write_all(&[21; HEADER]).unwrap();
        assert!(peek_channel(back.as_fd()).unwrap().is_none());
        let (mine, theirs) = UnixStream::pair().unwrap();
        let channel = Channel(theirs.into());
        drop(mine);
        assert!(channel.config_changed().is_err());
    }

    #[test]
    fn a_size_only_grows_and_whoever_waits_is_woken_once() {
        let capacity = Capacity::new(1 << 20).unwrap();
        let engines = capacity.clone();
        assert!(!capacity.take_change());
        engines.grow(2 << 20);
        engines.grow(1 << 20);
        assert_eq!(capacity.sectors(), 4096);
        assert!(capacity.take_change() && !capacity.take_change());
    }
}
