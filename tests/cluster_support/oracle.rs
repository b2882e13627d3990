//! What a disk may answer. Every write has a number of its own, and each 512-byte sector is made of the write's number and
//! the sector's place, so that any sector read tells which write it came from.

use std::collections::BTreeSet;
use std::time::SystemTime;

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// A write that a sector may hold.
#[derive(Clone, Copy, Debug)]
struct Held {
    write: u64,
    /// When it was answered, on the oracle's own clock; `None`: it is under way, or nobody knows.
    answered: Option<u64>,
}

/// Writes with numbers from here on are [`stranger`]s'.
const STRANGER: u64 = 1 << 40;

/// What a sector holds at first: zeros.
const BLANK: Held = Held {
    write: 0,
    answered: Some(0),
};

/// For each sector, the writes that may be its content: the last ones answered, and those under way.
pub struct Oracle {
    /// An empty list stands for [`BLANK`].
    sectors: Vec<Vec<Held>>,
    clock: u64,
    writes: u64,
    /// Where each write went, and when it began, by its number less one.
    places: Vec<(usize, usize, SystemTime)>,
    /// The writes that write zeros. What they leave looks like write 0.
    zeros: BTreeSet<u64>,
}

/// What sectors may hold when a read begins.
#[derive(Debug)]
pub struct Look {
    sector: usize,
    may: Vec<Vec<u64>>,
    /// Writes with a higher number began later.
    writes: u64,
}

/// A write under way.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    write: u64,
    sector: usize,
    sectors: usize,
    begun: u64,
}

impl Oracle {
    /// A disk of zeros.
    pub fn new(bytes: u64) -> Oracle {
        Oracle {
            sectors: vec![Vec::new(); bytes as usize / SECTOR],
            clock: 0,
            writes: 0,
            places: Vec::new(),
            zeros: BTreeSet::new(),
        }
    }

    /// More zeros at the end.
    pub fn grow(&mut self, bytes: u64) {
        self.sectors.resize(bytes as usize / SECTOR, Vec::new());
    }

    pub fn bytes(&self) -> u64 {
        (self.sectors.len() * SECTOR) as u64
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A write is submitted: fills its buffer.
    pub fn begin(&mut self, sector: usize, data: &mut [u8]) -> Ticket {
        let ticket = self.begun(sector, data.len() / SECTOR);
        for (place, bytes) in (sector..).zip(data.chunks_mut(SECTOR)) {
            content(ticket.write, place, bytes);
        }
        ticket
    }

    /// A discard, or a write of zeros, is submitted.
    pub fn begin_zeros(&mut self, sector: usize, sectors: usize) -> Ticket {
        let ticket = self.begun(sector, sectors);
        self.zeros.insert(ticket.write);
        ticket
    }

    fn begun(&mut self, sector: usize, sectors: usize) -> Ticket {
        let begun = self.tick();
        self.writes += 1;
        let write = self.writes;
        self.places.push((sector, sectors, SystemTime::now()));
        for held in &mut self.sectors[sector..sector + sectors] {
            if held.is_empty() {
                held.push(BLANK);
            }
            let answered = None;
            held.push(Held { write, answered });
        }
        Ticket {
            write,
            sector,
            sectors,
            begun,
        }
    }

    /// It was answered. One that succeeded outdates all that were answered before it began; one that failed may be there or not.
    pub fn end(&mut self, ticket: Ticket, ok: bool) {
        let now = self.tick();
        for held in &mut self.sectors[ticket.sector..ticket.sector + ticket.sectors] {
            if ok {
                held.retain(|h| h.answered.is_none_or(|at| at > ticket.begun));
            }
            for h in held.iter_mut().filter(|h| h.write == ticket.write) {
                h.answered = Some(now);
            }
        }
    }

    /// Sectors were read after a power cut, which may have taken back writes that no flush covered: each holds one of the writes
    /// that ever went there, or what was there at first, and from now on just that.
    pub fn judge_after_power_cut(&mut self, sector: usize, data: &[u8]) -> Result<(), String> {
        for (place, bytes) in (sector..).zip(data.chunks(SECTOR)) {
            let number = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
            let mut whole = [0; SECTOR];
            content(number, place, &mut whole);
            if whole != *bytes || number > 0 && !self.went_to(number, place) {
                return Err(format!(
                    "sector {place} holds what nobody wrote there: {bytes:02x?}"
                ));
            }
            let answered = Some(self.clock);
            self.sectors[place] = vec![Held {
                write: number,
                answered,
            }];
        }
        Ok(())
    }

    /// Judges what was read, while no write to these sectors was under way (or nobody knows how it ended). From then on each
    /// sector holds what was seen (S9).
    pub fn judge(&mut self, sector: usize, data: &[u8]) -> Result<(), String> {
        let mut expected = [0; SECTOR];
        let zeros = &self.zeros;
        for (place, bytes) in (sector..).zip(data.chunks(SECTOR)) {
            let found = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            let shows = |h: &Held| h.write == found || found == 0 && zeros.contains(&h.write);
            let held = &mut self.sectors[place];
            let known = held.iter().any(shows) || held.is_empty() && found == 0;
            content(found, place, &mut expected);
            if !known || bytes != expected {
                let held = held.clone();
                return Err(self.explain(place, bytes, &format!("{held:?}"), &held));
            }
            // Of several writes of zeros nobody can tell which one it was.
            held.retain(shows);
            for h in held {
                h.answered.get_or_insert(0);
            }
        }
        Ok(())
    }

    /// A read begins that writes may overlap.
    pub fn look(&self, sector: usize, sectors: usize) -> Look {
        let may = self.sectors[sector..sector + sectors].iter();
        let numbers = |held: &Vec<Held>| match held.is_empty() {
            true => vec![BLANK.write],
            false => held.iter().map(|h| h.write).collect(),
        };
        Look {
            sector,
            may: may.map(numbers).collect(),
            writes: self.writes,
        }
    }

    /// Judges what that read brought: of each sector a write that was there when it began, or one that began since (S10).
    pub fn judge_look(&self, look: &Look, data: &[u8]) -> Result<(), String> {
        let mut expected = [0; SECTOR];
        let sectors = look.may.iter().zip(data.chunks(SECTOR));
        for (place, (may, bytes)) in (look.sector..).zip(sectors) {
            let found = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            content(found, place, &mut expected);
            let mut zeros = self.zeros.range(look.writes + 1..);
            let zeros_since = found == 0 && zeros.any(|w| self.went_to(*w, place));
            let since = found > look.writes && self.went_to(found, place) || zeros_since;
            let zeros = found == 0 && may.iter().any(|w| self.zeros.contains(w));
            if bytes != expected || !may.contains(&found) && !zeros && !since {
                let may = format!("{may:?} or one after {}", look.writes);
                return Err(self.explain(place, bytes, &may, &self.sectors[place]));
            }
        }
        Ok(())
    }

    fn went_to(&self, write: u64, place: usize) -> bool {
        let index = write.checked_sub(1).and_then(|i| usize::try_from(i).ok());
        index
            .and_then(|i| self.places.get(i))
            .is_some_and(|(at, len, _)| (*at..at + len).contains(&place))
    }

    /// A sector that holds what it must not.
    fn explain(&self, place: usize, bytes: &[u8], may: &str, held: &[Held]) -> String {
        let number = |range: std::ops::Range<usize>| {
            u64::from_le_bytes(bytes[range].try_into().expect("eight bytes"))
        };
        let (found, made_for) = (number(0..8), number(8..16));
        let mut expected = [0; SECTOR];
        content(found, place, &mut expected);
        let torn = if bytes == expected { "" } else { ", torn" };
        let mut text = format!(
            "sector {place} holds write {found}, made for sector {made_for}{torn}; it may hold {may}"
        );
        for write in held.iter().map(|h| h.write).chain([found]) {
            let index = usize::try_from(write.wrapping_sub(1)).unwrap_or(usize::MAX);
            if let Some((at, len, begun)) = self.places.get(index) {
                let begun = super::clock(*begun);
                text += &format!("; write {write} is {len} sectors from {at}, begun at {begun}");
            }
        }
        text
    }
}

/// A write by somebody who has no say any more: found on the disk, no oracle has an excuse for it.
pub fn stranger(number: u64, sector: usize, data: &mut [u8]) {
    for (place, bytes) in (sector..).zip(data.chunks_mut(SECTOR)) {
        content(STRANGER + number, place, bytes);
    }
}

/// The bytes that a write puts into a sector: half random, half not, so that compression has something to do. Write 0 is
/// the beginning: zeros.
fn content(write: u64, sector: usize, out: &mut [u8]) {
    out.fill(0);
    if write == 0 {
        return;
    }
    out[..8].copy_from_slice(&write.to_le_bytes());
    out[8..16].copy_from_slice(&(sector as u64).to_le_bytes());
    let mut random = Random::new(write ^ (sector as u64) << 40);
    for word in out[16..256].chunks_exact_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes());
    }
    out[256..].fill(write as u8 | 1);
}

/// xorshift64*.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }
}

#[test]
fn a_sector_holds_the_last_write_answered_or_one_under_way() {
    let mut oracle = Oracle::new(1024);
    let buffer = |oracle: &mut Oracle| {
        let mut data = vec![0; SECTOR];
        (oracle.begin(0, &mut data), data)
    };
    // Zeros at first;
    assert!(oracle.judge(0, &[0; SECTOR]).is_ok());
    // after one write was answered, that write and nothing else;
    let (first, first_data) = buffer(&mut oracle);
    oracle.end(first, true);
    assert!(oracle.judge(0, &[0; SECTOR]).is_err());
    assert!(oracle.judge(0, &first_data).is_ok());
    // after two that overlapped in time, either, and then always the same;
    let (second, second_data) = buffer(&mut oracle);
    let (third, third_data) = buffer(&mut oracle);
    oracle.end(third, true);
    oracle.end(second, true);
    assert!(oracle.judge(0, &first_data).is_err());
    assert!(oracle.judge(0, &second_data).is_ok());
    assert!(oracle.judge(0, &third_data).is_err());
    // after one that failed, it or what was there before.
    let (failed, _) = buffer(&mut oracle);
    oracle.end(failed, false);
    assert!(oracle.judge(0, &second_data).is_ok());
    // A read that began before a write was answered may bring what was there before, one that began after may not.
    let early = oracle.look(0, 1);
    let (fourth, fourth_data) = buffer(&mut oracle);
    oracle.end(fourth, true);
    assert!(oracle.judge_look(&early, &second_data).is_ok());
    assert!(oracle.judge_look(&early, &fourth_data).is_ok());
    assert!(oracle.judge_look(&early, &first_data).is_err());
    let late = oracle.look(0, 1);
    assert!(oracle.judge_look(&late, &second_data).is_err());
    // What a stranger wrote is never right, and a torn sector neither.
    let mut strange = vec![0; SECTOR];
    stranger(4, 0, &mut strange);
    assert!(oracle.judge_look(&late, &strange).is_err());
    assert!(oracle.judge(0, &strange).is_err());
    assert!(oracle.judge(0, &fourth_data).is_ok());
    let second_data = fourth_data;
    let mut torn = second_data;
    torn[511] ^= 2;
    assert!(oracle.judge(0, &torn).is_err());
}

#[test]
fn zeros_are_a_write_like_any_other() {
    let mut oracle = Oracle::new(1024);
    let none = [0; SECTOR];
    let mut data = vec![0; SECTOR];
    let write = oracle.begin(0, &mut data);
    oracle.end(write, true);
    // A read that began before the zeros may bring what was there before or them,
    let early = oracle.look(0, 1);
    let zeros = oracle.begin_zeros(0, 2);
    assert!(oracle.judge_look(&early, &data).is_ok());
    assert!(oracle.judge_look(&early, &none).is_ok());
    oracle.end(zeros, true);
    // one that begins after them only them,
    let late = oracle.look(0, 1);
    assert!(oracle.judge_look(&late, &none).is_ok());
    assert!(oracle.judge_look(&late, &data).is_err());
    assert!(oracle.judge(0, &data).is_err());
    assert!(oracle.judge(0, &[none, none].concat()).is_ok());
    // and zeros are wrong again once something else was written.
    let write = oracle.begin(0, &mut data);
    oracle.end(write, true);
    assert!(oracle.judge_look(&oracle.look(0, 1), &none).is_err());
    assert!(oracle.judge(0, &none).is_err());
    assert!(oracle.judge(0, &data).is_ok());
}
