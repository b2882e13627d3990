use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use super::{bitmap, state};
use crate::copy::layout::{data_len, meta_len};
use crate::copy::{GrowthError, LogImage, Store, StoreError};
use crate::replication::copy_state::CopyState;
use crate::replication::ids::Region;

/// 4 GiB and one sector: neither a multiple of a block nor of a chunk.
const SIZE: u64 = (4 << 30) + 512;

fn small() -> CopyState {
    CopyState {
        size: SIZE,
        ..state()
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut out: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    out.sort();
    out
}

#[test]
fn a_copy_is_made_whole_and_opens_with_what_was_written() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("v");
    let (store, mut loaded) = Store::create(&dir, &small(), false).unwrap();
    assert_eq!(
        (&loaded.state, &loaded.log),
        (&small(), &LogImage::Regions(vec![]))
    );
    assert_eq!(names(tmp.path()), ["v"]);
    assert_eq!(names(&dir), ["data", "meta"]);
    assert_eq!(
        fs::metadata(dir.join("data")).unwrap().len(),
        data_len(SIZE)
    );
    assert_eq!(
        fs::metadata(dir.join("meta")).unwrap().len(),
        meta_len(SIZE)
    );
    assert_eq!(store.allocated_bytes().unwrap(), 0);

    let mut next = small();
    next.bitmaps[1] = bitmap(7, 2);
    let mut writes = vec![loaded.metadata.superblock(&next)];
    writes.extend(loaded.metadata.log(&[Region(3)], &[]));
    writes.push(loaded.metadata.bitmap_page(1, 1, &[6]));
    for w in &writes {
        store.meta.write_all_at(&w.bytes, w.offset).unwrap();
    }
    drop(store);
    let (store, loaded) = Store::open(&dir).unwrap();
    assert_eq!(
        (loaded.state, loaded.log, loaded.warnings),
        (next, LogImage::Regions(vec![Region(3)]), vec![])
    );
    let bits = loaded.metadata.load_bitmap(&store.meta, 1, 65537);
    assert_eq!(
        (bits[480], bits.iter().map(|w| w.count_ones()).sum::<u32>()),
        (6, 2)
    );
}

#[test]
fn the_data_file_takes_a_single_sector_in_memory_of_the_alignment_it_names() {
    for base in [None, Some("/dev/shm")] {
        let tmp = base
            .map_or_else(tempfile::tempdir, tempfile::tempdir_in)
            .unwrap();
        let (store, _) = Store::create(&tmp.path().join("v"), &small(), false).unwrap();
        println!(
            "{:?}: direct {}, memory {}, memory_align {}",
            tmp.path(),
            store.direct,
            store.memory,
            store.memory_align
        );
        assert!(!(store.direct && store.memory));
        let align = store.memory_align as usize;
        let mut memory = vec![0u8; 512 + 2 * align];
        let start = memory.as_ptr().align_offset(align);
        let sector = &mut memory[start..start + 512];
        sector.fill(0xa5);
        store.data.write_all_at(sector, 3 * 512).unwrap();
        // The last, odd sector of the volume too.
        store.data.write_all_at(sector, SIZE - 512).unwrap();
        sector.fill(0);
        store.data.read_exact_at(sector, 3 * 512).unwrap();
        assert_eq!(sector, [0xa5; 512]);
        assert!((512..=16384).contains(&store.allocated_bytes().unwrap()));
    }
}

#[test]
fn a_second_opener_is_told_that_the_copy_is_in_use() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("v");
    let (store, _) = Store::create(&dir, &small(), false).unwrap();
    assert!(matches!(Store::open(&dir), Err(StoreError::InUse { .. })));
    assert!(matches!(Store::remove(&dir), Err(StoreError::InUse { .. })));
    // A duplicate is the same description, as a request in flight is: the lock outlives the `Store`.
    let in_flight = store.data.try_clone().unwrap();
    drop(store);
    assert!(matches!(Store::open(&dir), Err(StoreError::InUse { .. })));
    drop(in_flight);
    Store::open(&dir).unwrap();
}

#[test]
fn a_copy_is_neither_made_twice_nor_found_where_there_is_none() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("v");
    assert!(matches!(Store::open(&dir), Err(StoreError::Missing { .. })));
    assert!(matches!(
        Store::remove(&dir),
        Err(StoreError::Missing { .. })
    ));
    Store::create(&dir, &small(), false).unwrap();
    assert!(matches!(
        Store::create(&dir, &small(), false),
        Err(StoreError::Exists { .. })
    ));
    Store::remove(&dir).unwrap();
    assert!(names(tmp.path()).is_empty());
    Store::create(&dir, &small(), false).unwrap();
}

#[test]
fn a_copy_set_aside_is_kept_and_is_no_copy_any_more() {
    let tmp = tempfile::tempdir().unwrap();
    let id = small().volume_id.to_string();
    let dir = tmp.path().join(&id);
    for expected in ["aside-1-", "aside-2-"] {
        let (store, _) = Store::create(&dir, &small(), false).unwrap();
        assert!(matches!(
            Store::set_aside(&dir),
            Err(StoreError::InUse { .. })
        ));
        drop(store);
        let aside = Store::set_aside(&dir).unwrap();
        assert_eq!(aside, tmp.path().join(format!("{expected}{id}")));
        super::super::store::sweep(tmp.path()).unwrap();
        assert!(aside.join("data").exists() && !dir.exists());
    }
    assert!(matches!(
        Store::set_aside(&dir),
        Err(StoreError::Missing { .. })
    ));
}

#[test]
fn a_damaged_copy_is_refused_and_can_be_removed() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("v");
    let cut = |file: &str, len: u64| {
        Store::create(&dir, &small(), false).unwrap();
        OpenOptions::new()
            .write(true)
            .open(dir.join(file))
            .unwrap()
            .set_len(len)
            .unwrap();
        let e = Store::open(&dir).unwrap_err();
        Store::remove(&dir).unwrap();
        e
    };
    assert!(
        matches!(cut("data", SIZE - 512), StoreError::Truncated { file, expected, found }
        if file.ends_with("data") && expected == data_len(SIZE) && found == SIZE - 512)
    );
    assert!(
        matches!(cut("meta", meta_len(SIZE) - 1), StoreError::Truncated { file, .. } if file.ends_with("meta"))
    );
    assert!(matches!(cut("meta", 0), StoreError::Format { .. }));
}

#[test]
fn a_copy_grows_and_never_shrinks() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("v");
    let (store, mut loaded) = Store::create(&dir, &small(), false).unwrap();
    let lengths = || {
        (
            fs::metadata(dir.join("data")).unwrap().len(),
            fs::metadata(dir.join("meta")).unwrap().len(),
        )
    };
    store.growth(2 * SIZE, false).unwrap().run().unwrap();
    assert_eq!(lengths(), (data_len(2 * SIZE), meta_len(2 * SIZE)));
    // A crash before the superblock: longer files than it says are no harm.
    drop(store);
    let (store, _) = Store::open(&dir).unwrap();
    let mut grown = small();
    grown.size = 2 * SIZE;
    grown.bitmaps[0] = bitmap(1, 1);
    let w = loaded.metadata.superblock(&grown);
    store.meta.write_all_at(&w.bytes, w.offset).unwrap();
    store.growth(4096, true).unwrap().run().unwrap();
    assert_eq!(lengths(), (data_len(2 * SIZE), meta_len(2 * SIZE)));
    drop(store);
    let (store, loaded) = Store::open(&dir).unwrap();
    assert_eq!(loaded.state, grown);
    assert!(
        loaded
            .metadata
            .load_bitmap(&store.meta, 0, 2 << 16)
            .iter()
            .all(|w| *w == 0)
    );
}

#[test]
fn preallocation_takes_the_whole_volume() {
    let tmp = tempfile::tempdir().unwrap();
    let state = CopyState {
        size: 3 << 20,
        ..state()
    };
    let (store, _) = Store::create(&tmp.path().join("v"), &state, true).unwrap();
    assert!(store.allocated_bytes().unwrap() >= 3 << 20);
    store.growth(5 << 20, true).unwrap().run().unwrap();
    assert!(store.allocated_bytes().unwrap() >= 5 << 20);
}

/// A file system of `size` bytes, gone with this value.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    /// `None`, visibly, where this user cannot mount.
    fn mount(size: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let options = format!("size={size}");
        let done = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(dir.path())
            .output();
        match done {
            Ok(out) if out.status.success() => Some(Self(dir)),
            other => {
                eprintln!("SKIPPED: cannot mount a small tmpfs here: {other:?}");
                None
            }
        }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_is_named_with_what_is_needed_and_leaves_nothing_behind() {
    let Some(fs) = Tmpfs::mount(64 << 10) else {
        return;
    };
    let dir = fs.0.path().join("v");
    let e = Store::create(&dir, &small(), false).unwrap_err();
    assert!(
        matches!(&e, StoreError::NoSpace { dir: d, needed, free }
        if *d == dir && *needed >= meta_len(SIZE) && *free == 64 << 10),
        "{e}"
    );
    assert!(names(fs.0.path()).is_empty());
}

#[test]
fn a_disk_that_fills_up_on_the_way_is_named_and_a_copy_that_cannot_grow_stays_usable() {
    let Some(fs) = Tmpfs::mount(2 << 20) else {
        return;
    };
    let dir = fs.0.path().join("v");
    let state = CopyState {
        size: 1 << 20,
        ..state()
    };
    let (store, _) = Store::create(&dir, &state, false).unwrap();
    assert!(store.memory && !store.direct);
    let e = store.growth(8 << 20, true).unwrap().run().unwrap_err();
    let GrowthError::NoRoom(StoreError::NoSpace { needed, free, .. }) = &e else {
        panic!("{e}")
    };
    assert!(*needed == 7 << 20 && *free < 2 << 20, "{e}");
    drop(store);
    assert_eq!(Store::open(&dir).unwrap().1.state, state);
}
