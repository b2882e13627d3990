//! What a disk may answer. Every write has a number of its own, and each 512-byte sector is made of the write's number and
//! the sector's place, so that any sector read tells which write it came from.

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// A write that a sector may hold.
#[derive(Clone, Copy, Debug)]
struct Held {
    write: u64,
    /// When it was answered, on the oracle's own clock; `None`: it is under way, or nobody knows.
    answered: Option<u64>,
}

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
        }
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
        let begun = self.tick();
        self.writes += 1;
        let write = self.writes;
        for (place, bytes) in (sector..).zip(data.chunks_mut(SECTOR)) {
            content(write, place, bytes);
            let held = &mut self.sectors[place];
            if held.is_empty() {
                held.push(BLANK);
            }
            let answered = None;
            held.push(Held { write, answered });
        }
        Ticket {
            write,
            sector,
            sectors: data.len() / SECTOR,
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

    /// Judges what was read, while no write to these sectors was under way (or nobody knows how it ended). From then on each
    /// sector holds what was seen (S9).
    pub fn judge(&mut self, sector: usize, data: &[u8]) -> Result<(), String> {
        let mut expected = [0; SECTOR];
        for (place, bytes) in (sector..).zip(data.chunks(SECTOR)) {
            let found = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            let held = &mut self.sectors[place];
            let known = held.iter().any(|h| h.write == found) || held.is_empty() && found == 0;
            content(found, place, &mut expected);
            if !known || bytes != expected {
                let made_for = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
                let torn = if bytes == expected { "" } else { ", torn" };
                return Err(format!(
                    "sector {place} holds write {found}, made for sector {made_for}{torn}; it may hold {held:?}"
                ));
            }
            held.retain(|h| h.write == found);
            if let Some(h) = held.first_mut() {
                h.answered.get_or_insert(0);
            }
        }
        Ok(())
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
    // A torn sector is never right.
    let mut torn = second_data;
    torn[511] ^= 2;
    assert!(oracle.judge(0, &torn).is_err());
}
