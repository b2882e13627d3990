//! The front-end's memory table: which files back the guest's memory, mapped, and what the front-end calls the same
//! bytes. A vhost-user front-end gives ring addresses in its own address space; everything else is guest-physical.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use thiserror::Error;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{GuestAddress, GuestMemoryRegion, GuestRegionMmap};

use super::GuestMem;

type Region = GuestRegionMmap<()>;

/// Regions that a front-end may add. Kernel vhost has had this limit for long, so front-ends expect no more, and it
/// bounds the mappings that one connection can make.
pub(super) const MAX_MEM_SLOTS: usize = 509;

/// What to do when memory does not arrive. Said wherever the cause may be that the guest's memory is private.
pub(super) const SHARE_HINT: &str = "guest memory must be shared with this process: for QEMU \
    `-object memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem`, \
    for cloud-hypervisor `--memory size=SIZE,shared=on`";

/// Why a memory table is refused.
#[derive(Debug, Error)]
pub(super) enum TableError {
    #[error("region {addr:#x}+{size:#x} cannot be mapped: {reason}; {SHARE_HINT}")]
    Map {
        addr: u64,
        size: u64,
        reason: String,
    },
    #[error("the regions overlap or wrap around: {0}")]
    Layout(String),
    #[error("more than {MAX_MEM_SLOTS} regions")]
    TooMany,
    #[error("region {addr:#x}+{size:#x} is not in the table")]
    Unknown { addr: u64, size: u64 },
    #[error("{regions} regions came with {files} descriptors; {SHARE_HINT}")]
    Files { regions: usize, files: usize },
}

#[derive(Clone)]
struct Slot {
    user_addr: u64,
    guest_addr: u64,
    size: u64,
    region: Arc<Region>,
}

/// The table in force. Starts empty.
#[derive(Default)]
pub(super) struct MemTable {
    slots: Vec<Slot>,
    mem: Arc<GuestMem>,
}

impl MemTable {
    /// Takes a whole new table (SET_MEM_TABLE). On error the old one stays.
    pub(super) fn replace(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
    ) -> Result<(), TableError> {
        if regions.len() != files.len() {
            return Err(TableError::Files {
                regions: regions.len(),
                files: files.len(),
            });
        }
        let slots = regions
            .iter()
            .zip(files)
            .map(|(region, file)| map(region, file))
            .collect::<Result<_, _>>()?;
        self.adopt(slots)
    }

    /// Adds one region (ADD_MEM_REG).
    pub(super) fn add(
        &mut self,
        region: &VhostUserMemoryRegion,
        file: File,
    ) -> Result<(), TableError> {
        let mut slots = self.slots.clone();
        slots.push(map(region, file)?);
        self.adopt(slots)
    }

    /// Removes one region (REM_MEM_REG), named by both addresses and its size. It stays mapped for the requests that
    /// are in it.
    pub(super) fn remove(&mut self, region: &VhostUserMemoryRegion) -> Result<(), TableError> {
        let mut slots = self.slots.clone();
        slots.retain(|slot| {
            (slot.guest_addr, slot.user_addr, slot.size)
                != (region.guest_phys_addr, region.user_addr, region.memory_size)
        });
        if slots.len() == self.slots.len() {
            return Err(TableError::Unknown {
                addr: region.guest_phys_addr,
                size: region.memory_size,
            });
        }
        self.adopt(slots)
    }

    fn adopt(&mut self, mut slots: Vec<Slot>) -> Result<(), TableError> {
        if slots.len() > MAX_MEM_SLOTS {
            return Err(TableError::TooMany);
        }
        // A front-end may send its regions in any order; the collection wants them sorted.
        slots.sort_by_key(|slot| slot.guest_addr);
        let mem = if slots.is_empty() {
            GuestMem::new()
        } else {
            let regions = slots.iter().map(|slot| Arc::clone(&slot.region)).collect();
            GuestMem::from_arc_regions(regions).map_err(|e| TableError::Layout(e.to_string()))?
        };
        self.mem = Arc::new(mem);
        self.slots = slots;
        Ok(())
    }

    /// The memory, to be shared with the data path.
    pub(super) fn mem(&self) -> Arc<GuestMem> {
        Arc::clone(&self.mem)
    }

    /// Whether no memory was sent yet.
    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The first guest-physical address beyond all memory.
    pub(super) fn end(&self) -> u64 {
        // Sorted; the sum was checked when the region was mapped.
        self.slots
            .last()
            .map_or(0, |slot| slot.guest_addr + slot.size)
    }

    /// The regions as a front-end describes them, each with its file once more; in the order of their guest addresses.
    ///
    /// # Errors
    ///
    /// The process has no descriptors left.
    pub(super) fn describe(&self) -> io::Result<Vec<(VhostUserMemoryRegion, OwnedFd)>> {
        let describe = |slot: &Slot| {
            // Each was mapped from a file.
            let file = slot
                .region
                .file_offset()
                .ok_or(io::ErrorKind::InvalidData)?;
            let (size, user) = (slot.size, slot.user_addr);
            let region = VhostUserMemoryRegion::new(slot.guest_addr, size, user, file.start());
            Ok((region, file.file().as_fd().try_clone_to_owned()?))
        };
        self.slots.iter().map(describe).collect()
    }

    /// Translates an address of the front-end's.
    pub(super) fn guest_addr(&self, user_addr: u64) -> Option<GuestAddress> {
        self.slots.iter().find_map(|slot| {
            let offset = user_addr.checked_sub(slot.user_addr)?;
            // The region's end does not overflow: the mapping exists.
            (offset < slot.size).then(|| GuestAddress(slot.guest_addr + offset))
        })
    }
}

fn map(region: &VhostUserMemoryRegion, file: File) -> Result<Slot, TableError> {
    let cannot = |reason: String| TableError::Map {
        addr: region.guest_phys_addr,
        size: region.memory_size,
        reason,
    };
    // A page beyond the end of its file faults at the first access, and the mapping layer does not look. Devices that
    // can be mapped have no length.
    if let Ok(meta) = file.metadata()
        && meta.is_file()
        && region
            .mmap_offset
            .checked_add(region.memory_size)
            .is_none_or(|end| end > meta.len())
    {
        return Err(cannot(format!(
            "it reaches beyond the end of its file ({} bytes)",
            meta.len()
        )));
    }
    let mapping = region
        .mmap_region(file)
        .map_err(|e| cannot(e.to_string()))?;
    let mapped = Region::new(mapping, GuestAddress(region.guest_phys_addr))
        .ok_or_else(|| cannot("it wraps around the address space".into()))?;
    Ok(Slot {
        user_addr: region.user_addr,
        guest_addr: region.guest_phys_addr,
        size: region.memory_size,
        region: Arc::new(mapped),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryBackend;

    const PAGE: u64 = 4096;

    fn region(guest: u64, user: u64, size: u64, offset: u64) -> VhostUserMemoryRegion {
        VhostUserMemoryRegion::new(guest, size, user, offset)
    }

    fn file(size: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        file
    }

    #[test]
    fn regions_may_come_in_any_order_and_translate_both_ways() {
        let mut table = MemTable::default();
        assert!(table.is_empty() && table.guest_addr(0).is_none());
        table
            .replace(
                &[
                    region(8 * PAGE, 0x7000_0000, PAGE, PAGE),
                    region(0, 0x6000_0000, 2 * PAGE, 0),
                ],
                vec![file(2 * PAGE), file(2 * PAGE)],
            )
            .unwrap();
        assert_eq!(table.mem().num_regions(), 2);
        assert_eq!(
            table.guest_addr(0x7000_0010),
            Some(GuestAddress(8 * PAGE + 0x10))
        );
        assert_eq!(
            table.guest_addr(0x6000_0000 + 2 * PAGE - 1),
            Some(GuestAddress(2 * PAGE - 1))
        );
        assert_eq!(table.guest_addr(0x6000_0000 + 2 * PAGE), None);
        assert_eq!(table.guest_addr(0x5fff_ffff), None);
    }

    #[test]
    fn a_bad_table_is_refused_and_the_old_one_stays() {
        let mut table = MemTable::default();
        table
            .add(&region(0, 0x1000_0000, PAGE, 0), file(PAGE))
            .unwrap();

        let beyond_file = table.add(&region(4 * PAGE, 0, 2 * PAGE, 0), file(PAGE));
        assert!(beyond_file.unwrap_err().to_string().contains("share=on"));
        let (read_end, _write_end) = std::io::pipe().unwrap();
        let pipe = File::from(std::os::fd::OwnedFd::from(read_end));
        assert!(table.add(&region(4 * PAGE, 0, PAGE, 0), pipe).is_err());
        assert!(
            table
                .add(&region(0, 0x2000_0000, PAGE, 0), file(PAGE))
                .is_err(),
            "overlap"
        );
        assert!(
            table
                .add(&region(4 * PAGE, 0, PAGE, u64::MAX - PAGE), file(PAGE))
                .is_err()
        );
        assert!(
            table
                .add(&region(4 * PAGE, 0, PAGE, 1), file(2 * PAGE))
                .is_err(),
            "not on a page"
        );
        let wrapping = table.add(&region(u64::MAX - PAGE + 2, 0, PAGE, 0), file(PAGE));
        assert!(wrapping.is_err());
        assert!(table.replace(&[region(0, 0, PAGE, 0)], vec![]).is_err());

        assert_eq!(table.mem().num_regions(), 1);
        assert_eq!(table.guest_addr(0x1000_0000), Some(GuestAddress(0)));
    }

    #[test]
    fn a_removed_region_stays_mapped_for_those_who_hold_it() {
        let mut table = MemTable::default();
        let (a, b) = (
            region(0, 0x1000_0000, PAGE, 0),
            region(PAGE, 0x2000_0000, PAGE, 0),
        );
        table.add(&a, file(PAGE)).unwrap();
        table.add(&b, file(PAGE)).unwrap();
        let held = table.mem();
        table.remove(&a).unwrap();
        assert!(table.remove(&a).is_err());
        assert_eq!(table.mem().num_regions(), 1);
        assert_eq!(held.num_regions(), 2);
        table.remove(&b).unwrap();
        assert!(table.is_empty());
    }

    #[test]
    fn the_number_of_regions_is_bounded() {
        let mut table = MemTable::default();
        let shared = file(PAGE);
        for i in 0..MAX_MEM_SLOTS as u64 {
            table
                .add(
                    &region(i * PAGE, i * PAGE, PAGE, 0),
                    shared.try_clone().unwrap(),
                )
                .unwrap();
        }
        let one_more = region(1 << 40, 1 << 40, PAGE, 0);
        assert!(matches!(
            table.add(&one_more, shared),
            Err(TableError::TooMany)
        ));
    }
}
