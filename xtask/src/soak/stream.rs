//! Bytes that both ends of a connection can compute from a number, and the number itself.
//!
//! Every eight bytes depend on their place, so a piece that is lost, doubled or swapped shows at the
//! first byte that is elsewhere than it was sent.

/// Splitmix64: chance for whoever decides something, and the source of streams.
#[derive(Clone, Debug)]
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// At least `least`, at most `most`.
    pub(crate) const fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.next() % (most - least + 1)
    }

    pub(crate) fn one_of<'a, T>(&mut self, things: &'a [T]) -> Option<&'a T> {
        let last = things.len().checked_sub(1)?;
        things.get(self.between(0, last as u64) as usize)
    }
}

/// One direction of one connection.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    seed: u64,
    /// Bytes written or checked so far.
    at: u64,
}

/// A byte that is not the one that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wrong {
    pub(crate) at: u64,
}

impl Stream {
    /// The stream of a direction: client to server or back.
    pub(crate) const fn new(connection: u64, up: bool) -> Self {
        let direction = if up { 0 } else { 0x5851_f42d_4c95_7f2d };
        Self {
            seed: mix(connection ^ direction),
            at: 0,
        }
    }

    pub(crate) const fn at(&self) -> u64 {
        self.at
    }

    /// The next bytes of the stream.
    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        self.walk(bytes.len(), |range, expected| {
            if let Some(piece) = bytes.get_mut(range) {
                piece.copy_from_slice(expected);
            }
            true
        });
    }

    /// Compares with the next bytes of the stream.
    pub(crate) fn check(&mut self, bytes: &[u8]) -> Result<(), Wrong> {
        let start = self.at;
        let mut good = 0;
        let right = self.walk(bytes.len(), |range, expected| {
            let piece = bytes.get(range).unwrap_or_default();
            let same = piece.iter().zip(expected).take_while(|(a, b)| a == b);
            let same = same.count();
            good += same;
            same == expected.len()
        });
        if right {
            Ok(())
        } else {
            Err(Wrong {
                at: start + good as u64,
            })
        }
    }

    /// Goes through the next `length` bytes, a word or a part of one at a time, until `visit` has
    /// enough.
    fn walk(
        &mut self,
        length: usize,
        mut visit: impl FnMut(std::ops::Range<usize>, &[u8]) -> bool,
    ) -> bool {
        let mut done = 0;
        while done < length {
            let word = mix(self.seed.wrapping_add(self.at / 8)).to_le_bytes();
            let from = (self.at % 8) as usize;
            let take = (8 - from).min(length - done);
            let expected = word.get(from..from + take).unwrap_or_default();
            if !visit(done..done + take, expected) {
                return false;
            }
            done += take;
            self.at += take as u64;
        }
        true
    }
}

const fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(stream: &mut Stream, pieces: &[usize]) -> Vec<u8> {
        let mut all = Vec::new();
        for length in pieces {
            let mut piece = vec![0; *length];
            stream.fill(&mut piece);
            all.extend(piece);
        }
        all
    }

    #[test]
    fn a_stream_is_the_same_however_it_is_cut() {
        let whole = bytes(&mut Stream::new(7, true), &[64]);
        let cut = bytes(&mut Stream::new(7, true), &[1, 7, 9, 3, 44]);
        assert_eq!(whole, cut);
        let mut check = Stream::new(7, true);
        assert_eq!(check.check(&whole[..13]), Ok(()));
        assert_eq!(check.check(&whole[13..]), Ok(()));
        assert_eq!(check.at(), 64);
    }

    #[test]
    fn a_lost_a_doubled_and_a_swapped_piece_show_where_they_begin() {
        let right = bytes(&mut Stream::new(7, true), &[64]);
        let mut lost = right.clone();
        lost.drain(16..24);
        let mut doubled = right.clone();
        doubled.splice(16..16, right[8..16].to_vec());
        let mut swapped = right.clone();
        swapped[16..32].rotate_left(8);
        for changed in [lost, doubled, swapped] {
            let found = Stream::new(7, true).check(&changed);
            assert!(found.is_err_and(|wrong| (16..18).contains(&wrong.at)));
        }
    }

    #[test]
    fn directions_and_connections_differ() {
        let one = bytes(&mut Stream::new(7, true), &[32]);
        for other in [Stream::new(7, false), Stream::new(8, true)] {
            assert_ne!(one, bytes(&mut other.clone(), &[32]));
        }
    }
}
