// SPDX-License-Identifier: GPL-2.0-or-later
//! What one client of many has been told, kept in little room and checked message by message.
//!
//! It holds no descriptors and knows no sockets: [`crowd`](super::crowd) feeds it. A message that the protocol does not
//! allow at that place, or that would corrupt a QEMU, is an error that says which rule it broke.

#![forbid(unsafe_code)]

/// A set of ids that takes as much room as its largest member needs.
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

/// What a client knows.
#[derive(Debug, Default)]
pub(crate) struct View {
    greeted: u8,
    id: Option<u16>,
    /// Those with all their vectors, itself included.
    known: Ids,
    /// Those that it was told have left.
    gone: Ids,
    /// The peer whose vectors are coming, and how many have come.
    coming: Option<(u16, u32)>,
    /// The server refused it, with a message that makes a QEMU end.
    refused: bool,
    /// Messages in all.
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

    /// Whether it has all its own vectors, which is what a QEMU waits for when it starts.
    pub(crate) fn is_welcomed(&self) -> bool {
        self.id.is_some_and(|id| self.known.contains(id))
    }

    /// Whether it knows `who`, all of them whole, and nobody else.
    pub(crate) fn knows_exactly(&self, who: &Ids) -> bool {
        self.coming.is_none()
            && self.known.len() == who.len()
            && who.iter().all(|id| self.known.contains(id))
    }

    /// Takes one message in; `vectors` is what each peer has.
    pub(crate) fn note(&mut self, value: i64, has_fd: bool, vectors: u32) -> Result<(), String> {
        self.messages += 1;
        if self.refused {
            return Err(format!("{value} after a refusal"));
        }
        match (self.greeted, value, has_fd) {
            (0, 1, false) | (1 | 2, -2, false) => self.refused = true,
            (0, 0, false) | (2, -1, true) => self.greeted += 1,
            (1, 0..=0xffff, false) => {
                self.id = Some(value as u16);
                self.greeted += 1;
            }
            (3, 0..=0xffff, true) => self.vector(value as u16, vectors)?,
            (3, 0..=0xffff, false) => self.goodbye(value as u16)?,
            (at, ..) => {
                return Err(format!(
                    "{value}, descriptor: {has_fd}, at place {at} of the greeting"
                ));
            }
        }
        Ok(())
    }

    fn vector(&mut self, id: u16, vectors: u32) -> Result<(), String> {
        let so_far = match self.coming.take() {
            Some((same, so_far)) if same == id => so_far,
            Some((other, so_far)) => {
                return Err(format!(
                    "a vector of {id} where {other} has only {so_far} of {vectors}"
                ));
            }
            None if self.gone.contains(id) => return Err(format!("id {id} came back")),
            None if self.known.contains(id) => return Err(format!("peer {id} a second time")),
            None => 0,
        };
        if so_far + 1 == vectors {
            self.known.insert(id);
        } else {
            self.coming = Some((id, so_far + 1));
        }
        Ok(())
    }

    fn goodbye(&mut self, id: u16) -> Result<(), String> {
        if self.id == Some(id) {
            return Err("a goodbye of itself".to_owned());
        }
        // One who left while its vectors were being told.
        let half = self.coming.take_if(|(coming, _)| *coming == id).is_some();
        if !half && !self.known.remove(id) {
            return Err(format!("a goodbye of {id}, who was not there"));
        }
        self.gone.insert(id);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A view of a client with id 1 and two vectors each, after these messages.
    fn after(messages: &[(i64, bool)]) -> Result<View, String> {
        let mut view = View::default();
        for &(value, has_fd) in [(0, false), (1, false), (-1, true)].iter().chain(messages) {
            view.note(value, has_fd, 2)?;
        }
        Ok(view)
    }

    #[test]
    fn a_view_takes_what_the_protocol_allows() {
        let view =
            after(&[(0, true), (0, true), (1, true), (1, true), (2, true), (0, false), (2, true)])
                .unwrap();
        let mut who = Ids::default();
        who.insert(1);
        assert!(view.is_welcomed() && !view.knows_exactly(&who), "only 1 and 2 are here: {view:?}");
        who.insert(2);
        assert!(view.knows_exactly(&who), "{view:?}");
    }

    #[test]
    fn a_view_takes_nothing_else() {
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
