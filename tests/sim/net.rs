//! Connections: in order and reliable until they break; a break loses what is under way in both directions.

/// One connection between an attachment and a copy.
pub struct Session {
    pub att: usize,
    pub copy: usize,
    /// Messages still arrive at the copy.
    pub to_copy: bool,
    /// Messages still arrive at the attachment.
    pub to_att: bool,
    /// When the last message of each direction arrives: the next one does not overtake it.
    pub last_to_copy: u64,
    pub last_to_att: u64,
}

/// Which pairs of nodes cannot talk, and until when.
#[derive(Default)]
pub struct Partitions(Vec<(usize, usize, u64)>);

impl Partitions {
    pub fn cut(&mut self, a: usize, b: usize, until: u64) {
        self.0.push((a.min(b), a.max(b), until));
    }

    /// When `a` and `b` can talk again; 0 if they can.
    pub fn until(&self, a: usize, b: usize, now: u64) -> u64 {
        let pair = (a.min(b), a.max(b));
        self.0
            .iter()
            .filter(|(x, y, until)| (*x, *y) == pair && *until > now)
            .map(|(.., until)| *until)
            .max()
            .unwrap_or(0)
    }

    pub fn heal(&mut self) {
        self.0.clear();
    }
}
