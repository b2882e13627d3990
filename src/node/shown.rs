//! What each machine that is served here was shown, in a file of its own in the data directory (`served/<volume>.json`), so that the next
//! process can answer its front-end before the registry has said what is to be served (docs/ARCHITECTURE.md, "Listen first").
//!
//! It decides nothing about data: whoever is answered from it gets no request done until the volume is attached by its record. So a
//! file that is out of date costs a connection, and one that is damaged or missing a socket that is there later. What it says of
//! the size is never less than what the guest was shown: it is written first.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cluster::host::{AttachRequest, Front};
use crate::replication::ids::VolumeId;

/// The format that this program writes, and the newest it reads.
const FORMAT: u32 = 1;
const DIR: &str = "served";
const ENDING: &str = "json";

/// What a machine was shown of its disk, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shown {
    /// Which disk.
    pub(super) volume: VolumeId,
    /// `namespace/name`, for messages.
    pub(super) name: String,
    /// Where the machine connects.
    pub(super) socket: PathBuf,
    /// Virtqueues offered.
    pub(super) num_queues: u16,
    /// Whether writes are refused.
    pub(super) read_only: bool,
    /// Bytes of a logical block.
    pub(super) block_size: u32,
    /// Bytes of the disk.
    pub(super) size: u64,
}

/// The content of a file.
#[derive(Serialize, Deserialize)]
struct Content {
    format: u32,
    #[serde(flatten)]
    shown: Shown,
}

/// Just enough of it to tell its format.
#[derive(Deserialize)]
struct AnyFormat {
    format: u32,
}

impl Shown {
    /// What a machine is shown that is served as asked.
    pub(super) fn of(request: &AttachRequest, front: &Front) -> Shown {
        Shown {
            volume: request.volume,
            name: request.name.clone(),
            socket: front.socket.clone(),
            num_queues: front.num_queues,
            read_only: front.read_only,
            block_size: request.record.block_size,
            size: request.record.size,
        }
    }

    /// Whether a machine that was shown this can be served as `now` without connecting again. A larger size it can be told.
    ///
    /// # Errors
    ///
    /// What is another, a clause.
    pub(super) fn becomes(&self, now: &Shown) -> Result<(), String> {
        let differs = |what: &str, was: &dyn ToString, is: &dyn ToString| {
            let (was, is) = (was.to_string(), is.to_string());
            match was == is {
                true => Ok(()),
                false => Err(format!("{what} was {was} and is {is}")),
            }
        };
        differs("its socket", &self.socket.display(), &now.socket.display())?;
        differs("its number of queues", &self.num_queues, &now.num_queues)?;
        differs("read-only", &self.read_only, &now.read_only)?;
        differs("its block size", &self.block_size, &now.block_size)?;
        if now.size < self.size {
            return Err(format!("its size was {} and is {}", self.size, now.size));
        }
        Ok(())
    }
}

/// The files.
#[derive(Debug)]
pub(super) struct Memory {
    dir: PathBuf,
}

impl Memory {
    /// Those in the data directory.
    pub(super) fn of(data_dir: &Path) -> Memory {
        Memory {
            dir: data_dir.join(DIR),
        }
    }

    fn file(&self, volume: VolumeId) -> PathBuf {
        self.dir.join(format!("{volume}.{ENDING}"))
    }

    /// Remembers it, durably. What fails is said: it costs nothing until the registry is away when this node begins.
    pub(super) fn note(&self, shown: &Shown) {
        if let Err(e) = self.write(shown) {
            log::warn!(
                "volume {}: {} cannot be written ({e}): should this node begin again while the registry does not answer, its \
                 machine is not listened for until it does",
                shown.name,
                self.file(shown.volume).display()
            );
        }
    }

    /// As a whole: a crash leaves the old file or the new one.
    fn write(&self, shown: &Shown) -> io::Result<()> {
        let file = self.file(shown.volume);
        if read(&file).is_ok_and(|present| present == *shown) {
            return Ok(());
        }
        fs::create_dir_all(&self.dir)?;
        let text = serde_json::to_vec_pretty(&Content {
            format: FORMAT,
            shown: shown.clone(),
        })?;
        let new = file.with_extension("new");
        let mut out = File::create(&new)?;
        out.write_all(&text)?;
        out.sync_all()?;
        fs::rename(&new, &file)?;
        File::open(&self.dir)?.sync_all()
    }

    /// It is not served here any more.
    pub(super) fn forget(&self, volume: VolumeId) {
        let file = self.file(volume);
        match fs::remove_file(&file) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => log::warn!(
                "{} cannot be removed ({e}): should this node begin again while the registry does not answer, a machine is \
                 listened for in vain",
                file.display()
            ),
            _ => {}
        }
    }

    /// All that is remembered. What cannot be understood is said and passed over.
    pub(super) fn recall(&self) -> Vec<Shown> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Vec::new(),
            Err(e) => {
                log::warn!("{} cannot be listed: {e}", self.dir.display());
                return Vec::new();
            }
        };
        let mut all = Vec::new();
        for path in entries.flatten().map(|entry| entry.path()) {
            // Beside them, what a crash left of one that was being written.
            if path.extension().is_none_or(|ending| ending != ENDING) {
                continue;
            }
            match read(&path) {
                Ok(shown) if self.file(shown.volume) == path => all.push(shown),
                Ok(shown) => log::warn!(
                    "{} is passed over: it is about volume {}",
                    path.display(),
                    shown.volume
                ),
                Err(why) => log::warn!("{} is passed over: {why}", path.display()),
            }
        }
        all.sort_by_key(|shown| shown.volume);
        all
    }
}

fn read(file: &Path) -> Result<Shown, String> {
    let text = fs::read(file).map_err(|e| e.to_string())?;
    let damaged = |e: serde_json::Error| format!("it is damaged ({e})");
    // Format first: the other fields of a newer one may be anything.
    let AnyFormat { format } = serde_json::from_slice(&text).map_err(damaged)?;
    if format > FORMAT {
        return Err(format!(
            "it has format {format}, and this program reads {FORMAT} at most"
        ));
    }
    let content: Content = serde_json::from_slice(&text).map_err(damaged)?;
    Ok(content.shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(n: u8) -> Shown {
        Shown {
            volume: VolumeId([n; 16]),
            name: format!("default/vm{n}"),
            socket: format!("/run/vm{n}.sock").into(),
            num_queues: 2,
            read_only: false,
            block_size: 512,
            size: 1 << 30,
        }
    }

    #[test]
    fn what_was_noted_last_is_recalled_and_what_is_damaged_newer_or_another_volumes_is_passed_over()
    {
        let dir = tempfile::tempdir().unwrap();
        let memory = Memory::of(dir.path());
        assert_eq!(memory.recall(), []);
        let [one, mut two, three, four, five] = [1, 2, 3, 4, 5].map(shown);
        for each in [&one, &two, &three, &four, &five] {
            memory.note(each);
        }
        two.size *= 2;
        memory.note(&two);
        // Torn, of another program, and copied by hand; half a file beside them.
        fs::write(memory.file(three.volume), b"{\"format\": 1, \"vol").unwrap();
        fs::write(memory.file(four.volume), b"{\"format\": 2, \"disks\": 7}").unwrap();
        fs::copy(memory.file(one.volume), memory.file(VolumeId([9; 16]))).unwrap();
        fs::write(memory.file(one.volume).with_extension("new"), b"{").unwrap();
        assert_eq!(memory.recall(), [one.clone(), two, five.clone()]);
        memory.forget(one.volume);
        memory.forget(one.volume);
        memory.forget(VolumeId([2; 16]));
        // What was damaged is written anew when it is served again.
        memory.note(&three);
        assert_eq!(memory.recall(), [three, five]);
    }

    #[test]
    fn a_machine_goes_on_with_a_larger_disk_and_with_no_other_difference() {
        let was = shown(1);
        assert_eq!(was.becomes(&was), Ok(()));
        let change = |change: fn(&mut Shown)| {
            let mut now = shown(1);
            change(&mut now);
            was.becomes(&now)
        };
        assert_eq!(change(|now| now.size *= 2), Ok(()));
        let smaller = change(|now| now.size /= 2).unwrap_err();
        assert!(smaller.contains("size was 1073741824 and is 536870912"));
        for (other, names) in [
            (change(|now| now.socket = "/other".into()), "/other"),
            (change(|now| now.num_queues = 1), "queues was 2 and is 1"),
            (change(|now| now.read_only = true), "read-only"),
            (change(|now| now.block_size = 4096), "512 and is 4096"),
        ] {
            assert!(other.as_ref().unwrap_err().contains(names), "{other:?}");
        }
    }
}
