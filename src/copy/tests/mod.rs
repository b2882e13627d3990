//! The metadata on a simulated disk: crashes between sectors, and rot.

mod bitmap;
mod growth;
mod log;
mod node_dir;
mod store;
mod superblock;

use std::io;

use super::layout::meta_len;
use super::{MetaWrite, Metadata, ReadAt};
use crate::replication::copy_state::{BITMAPS_MAX, Bitmap, CopyState, Standing};
use crate::replication::ids::{CopyId, Epoch, Tag, VolumeId};

/// 5 GiB: three bitmap pages a slot.
const SIZE: u64 = 5 << 30;

fn state() -> CopyState {
    CopyState {
        volume_id: VolumeId([1; 16]),
        copy_id: CopyId([2; 16]),
        size: SIZE,
        epoch: Epoch(3),
        tag: Tag(4),
        promised: Epoch(5),
        standing: Standing::InSync,
        clean: false,
        bitmaps: [None; BITMAPS_MAX],
    }
}

fn bitmap(copy: u8, last: u64) -> Option<Bitmap> {
    Some(Bitmap {
        copy_id: CopyId([copy; 16]),
        last: Epoch(last),
    })
}

/// A file of sectors; a lost one cannot be read.
#[derive(Clone)]
struct Disk {
    bytes: Vec<u8>,
    lost: Vec<usize>,
}

impl ReadAt for Disk {
    fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let start = (offset as usize).min(self.bytes.len());
        let end = (start + len).min(self.bytes.len());
        if self
            .lost
            .iter()
            .any(|s| (start / 512..end.div_ceil(512)).contains(s))
        {
            return Err(io::Error::other("medium error"));
        }
        Ok(self.bytes[start..end].to_vec())
    }
}

impl Disk {
    fn formatted(state: &CopyState) -> (Self, Metadata) {
        let (metadata, writes) = Metadata::format(state);
        let mut disk = Disk {
            bytes: vec![0; meta_len(state.size) as usize],
            lost: Vec::new(),
        };
        disk.apply(&writes);
        (disk, metadata)
    }

    fn apply(&mut self, writes: &[MetaWrite]) {
        self.tear(writes, |_| true);
    }

    /// Puts only those sectors of `writes` on the disk, counted through all of them, that `kept` says.
    fn tear(&mut self, writes: &[MetaWrite], kept: impl Fn(usize) -> bool) {
        let mut n = 0;
        for write in writes {
            assert_eq!((write.offset % 4096, write.bytes.len() % 4096), (0, 0));
            for (i, sector) in write.bytes.chunks(512).enumerate() {
                if kept(n) {
                    self.bytes[write.offset as usize + i * 512..][..512].copy_from_slice(sector);
                }
                n += 1;
            }
        }
    }

    fn flip(&mut self, bit: usize) {
        self.bytes[bit / 8] ^= 1 << (bit % 8);
    }
}
