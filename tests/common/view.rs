// SPDX-License-Identifier: GPL-2.0-or-later
//! The peers that one client knows from its messages, in little memory. Each message is checked.
//!
//! It holds no descriptors and reads no sockets: [`crowd`](super::crowd) and the checked client pass the messages
//! to it. A message that the protocol does not allow at that point, or that would corrupt a QEMU, gives an error
//! that names the broken rule.

#![forbid(unsafe_code)]

/// A set of ids. Its memory depends on the largest id in the set.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ids {
    words: Vec<u64>,
    len: usize,
}

impl Ids {
    pub(crate) fn insert(&mut self, id: u16) -> bool {
        let (word, bit) = (usize::from(id) / 64, 1 << (id % 64));
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        self.len += usize::from(new);
        new
    }

    pub(crate) fn remove(&mut self, id: u16) -> bool {
        let had = self.contains(id);
        if had {
            self.words[usize::from(id) / 64] &= !(1 << (id % 64));
            self.len -= 1;
        }
        had
    }

    pub(crate) fn contains(&self, id: u16) -> bool {
        self.words.get(usize::from(id) / 64).is_some_and(|word| word & (1 << (id % 64)) != 0)
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = u16> + use<'_> {
        (0..self.words.len() * 64).map(|id| id as u16).filter(|&id| self.contains(id))
    }
}

/// The peers that a client knows, and the state of its greeting.
#[derive(Debug, Default)]
pub(crate) struct View {
    /// How many of the first three messages have come: version, id, memory.
    greeting: u8,
    id: Option<u16>,
    /// The peers whose vectors have all come, this client included.
    known: Ids,
    /// The peers whose departure has come.
    gone: Ids,
    /// The peer whose vectors are incomplete, and how many have come.
    incomplete: Option<(u16, u32)>,
    /// The server refused the client, with a message that makes a QEMU end.
    refused: bool,
    /// The number of messages so far.
    messages: u64,
}

impl View {
    pub(crate) fn id(&self) -> Option<u16> {
        self.id
    }

    pub(crate) fn known(&self) -> &Ids {
        &self.known
    }

    pub(crate) fn gone(&self) -> &Ids {
        &self.gone
    }

    pub(crate) fn is_refused(&self) -> bool {
        self.refused
    }

    pub(crate) fn messages(&self) -> u64 {
        self.messages
    }

    /// Whether the client has all its own vectors. A QEMU waits for them when it starts.
    pub(crate) fn is_greeting_complete(&self) -> bool {
        self.id.is_some_and(|id| self.known.contains(id))
    }

    /// Whether the client knows exactly the peers `ids`, each with all its vectors.
    pub(crate) fn knows_exactly(&self, ids: &Ids) -> bool {
        self.incomplete.is_none()
            && self.known.len() == ids.len()
            && ids.iter().all(|id| self.known.contains(id))
    }

    /// Checks and records one message. `vectors` is the number of vectors of each peer.
    pub(crate) fn record(&mut self, value: i64, has_fd: bool, vectors: u32) -> Result<(), String> {
        self.messages += 1;
        if self.refused {
            return Err(format!("{value} after a refusal"));
        }
        match (self.greeting, value, has_fd) {
            (0, 1, false) | (1 | 2, -2, false) => self.refused = true,
            (0, 0, false) | (2, -1, true) => self.greeting += 1,
            (1, 0..=0xffff, false) => {
                self.id = Some(value as u16);
                self.greeting += 1;
            }
            (3, 0..=0xffff, true) => self.vector(value as u16, vectors)?,
            (3, 0..=0xffff, false) => self.departure(value as u16)?,
            (at, ..) => {
                return Err(format!(
                    "{value}, descriptor: {has_fd}, as message {at} of the greeting"
                ));
            }
        }
        Ok(())
    }

    fn vector(&mut self, id: u16, vectors: u32) -> Result<(), String> {
        let so_far = match self.incomplete.take() {
            Some((same, so_far)) if same == id => so_far,
            Some((other, so_far)) => {
                return Err(format!(
                    "a vector of {id}, although {other} has only {so_far} of {vectors}"
                ));
            }
            None if self.gone.contains(id) => return Err(format!("id {id} was used again")),
            None if self.known.contains(id) => return Err(format!("peer {id} a second time")),
            None => 0,
        };
        if so_far + 1 == vectors {
            self.known.insert(id);
        } else {
            self.incomplete = Some((id, so_far + 1));
        }
        Ok(())
    }

    fn departure(&mut self, id: u16) -> Result<(), String> {
        if self.id == Some(id) {
            return Err("a departure of the client itself".to_owned());
        }
        // The peer may have left before all its vectors were sent.
        let was_incomplete = self.incomplete.take_if(|(incomplete, _)| *incomplete == id).is_some();
        if !was_incomplete && !self.known.remove(id) {
            return Err(format!("a departure of {id}, which was not connected"));
        }
        self.gone.insert(id);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The view of a client with id 1 after these messages, with two vectors per peer.
    fn after(messages: &[(i64, bool)]) -> Result<View, String> {
        let mut view = View::default();
        for &(value, has_fd) in [(0, false), (1, false), (-1, true)].iter().chain(messages) {
            view.record(value, has_fd, 2)?;
        }
        Ok(view)
    }

    #[test]
    fn a_view_accepts_what_the_protocol_allows() {
        let view =
            after(&[(0, true), (0, true), (1, true), (1, true), (2, true), (0, false), (2, true)])
                .unwrap();
        let mut ids = Ids::default();
        ids.insert(1);
        assert!(
            view.is_greeting_complete() && !view.knows_exactly(&ids),
            "1 and 2 are known, not only 1: {view:?}"
        );
        ids.insert(2);
        assert!(view.knows_exactly(&ids), "{view:?}");
    }

    #[test]
    fn a_view_rejects_everything_else() {
        let wrong: [&[(i64, bool)]; 8] = [
            &[(-1, true)],
            &[(65536, true)],
            &[(0, true), (2, true)],
            &[(0, true), (0, true), (0, true)],
            &[(0, false)],
            &[(0, true), (0, true), (0, false), (0, false)],
            &[(0, true), (0, true), (0, false), (0, true)],
            &[(1, true), (1, true), (1, false)],
        ];
        for messages in wrong {
            assert!(after(messages).is_err(), "{messages:?}");
        }
    }
}
