//! The ports of a machine that runs, and how cards come into them and out of them. Pure; a driver asks its hypervisor and does it.

use super::Card;
use crate::host::pci::Address;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
};

/// Ports without a card that a machine is started with, for cards that come while it runs: a machine gets no port later. Each is a bus number and
/// a window in the guest's address space, and a moment of its boot.
pub const SPARE_PORTS: usize = 4;

/// A port for a card, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Port(pub u16);

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "port{}", self.0)
    }
}

impl FromStr for Port {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let number = text.strip_prefix("port").and_then(|number| number.parse().ok());
        number.map(Self).filter(|port| port.to_string() == text).ok_or(())
    }
}

/// The last slot of a guest's root bus that is free; the one behind it is the machine's own.
const LAST_SLOT: usize = 30;

impl Port {
    /// Its slot on the root bus of a guest that has so many ports: they are the last there, in their order, and what else a machine is given comes
    /// from the first slot on. None where there is no room for as many.
    pub fn slot(self, ports: usize) -> Option<u8> {
        let behind = ports.checked_sub(self.0.into())?;
        u8::try_from(LAST_SLOT.checked_sub(behind)?).ok().filter(|slot| *slot > 0)
    }
}

/// Where a guest sees a function of a card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The address that the port has in the guest.
    pub port: Address,
    /// The function's number there.
    pub function: u8,
}

/// Where a guest that has so many ports sees each function of these cards.
pub fn places<'a>(
    ports: usize,
    cards: impl IntoIterator<Item = (Port, &'a Card)>,
) -> BTreeMap<Address, Place> {
    let in_port = |(port, card): (Port, &'a Card)| {
        let port = port.slot(ports).and_then(Address::on_the_first_bus);
        let numbered = (0..).zip(&card.functions);
        numbered.filter_map(move |(function, address)| Some((*address, Place { port: port?, function })))
    };
    cards.into_iter().flat_map(in_port).collect()
}

/// The ports of a machine, as its hypervisor tells, each with the functions of the host's that are in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ports(pub BTreeMap<Port, BTreeSet<Address>>);

/// What has to be done for a machine to have the cards that it should have, in this order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Change {
    /// What goes.
    pub unplug: Vec<(Port, BTreeSet<Address>)>,
    /// What comes. Some functions of such a card may be there, if somebody was cut short.
    pub plug: Vec<(Port, Card)>,
}

/// A machine has fewer ports than cards.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoPort {
    /// It has some.
    #[error(
        "it was started with {ports} ports for cards, and is to have {cards} cards; it gets them with `vmctl restart`"
    )]
    TooFew {
        /// Its ports.
        ports: usize,
        /// The cards.
        cards: usize,
    },
    /// It has none at all.
    #[error(
        "it was started by an earlier release of laird, which gave it no ports for cards; it gets them with `vmctl restart`"
    )]
    None,
}

impl Ports {
    /// What brings the machine to `wanted`.
    pub fn change(&self, wanted: &[Card]) -> Result<Change, NoPort> {
        let no_port = || match self.0.len() {
            0 => NoPort::None,
            ports => NoPort::TooFew { ports, cards: wanted.len() },
        };
        let holds = |card: &Card, there: &BTreeSet<Address>| {
            !there.is_empty() && there.iter().all(|address| card.functions.contains(address))
        };
        let (mut change, mut free) = (Change::default(), Vec::new());
        for (port, there) in &self.0 {
            let card = wanted.iter().find(|card| holds(card, there));
            match card {
                Some(card) if card.functions.len() == there.len() => {}
                Some(card) => change.plug.push((*port, card.clone())),
                None => {
                    free.push(*port);
                    if !there.is_empty() {
                        change.unplug.push((*port, there.clone()));
                    }
                }
            }
        }
        // One that was empty before is there for certain.
        free.sort_by_key(|port| self.0.get(port).is_some_and(|there| !there.is_empty()));
        let mut free = free.into_iter();
        for card in wanted.iter().filter(|card| !self.0.values().any(|there| holds(card, there))) {
            change.plug.push((free.next().ok_or_else(no_port)?, card.clone()));
        }
        Ok(change)
    }

    /// All functions in it.
    pub fn functions(&self) -> BTreeSet<Address> {
        self.0.values().flatten().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn address(text: &str) -> Address {
        text.parse().unwrap()
    }

    fn card(functions: &[&str]) -> Card {
        Card { functions: functions.iter().map(|text| address(text)).collect() }
    }

    fn ports(ports: &[&[&str]]) -> Ports {
        let there = |functions: &&[&str]| functions.iter().map(|text| address(text)).collect();
        Ports((1..).map(Port).zip(ports.iter().map(there)).collect())
    }

    const DISK: &str = "0000:01:00.0";
    const GPU: [&str; 2] = ["0000:02:00.0", "0000:02:00.1"];

    #[test]
    fn what_is_there_stays_where_it_is_and_the_rest_comes_and_goes() {
        let there = ports(&[&[DISK], &[], &[]]);
        assert_eq!(there.change(&[card(&[DISK])]).unwrap(), Change::default());
        let both = there.change(&[card(&GPU), card(&[DISK])]).unwrap();
        assert_eq!(both, Change { unplug: vec![], plug: vec![(Port(2), card(&GPU))] });
        let other = there.change(&[card(&GPU)]).unwrap();
        let gone = vec![(Port(1), BTreeSet::from([address(DISK)]))];
        // Not into the port that the guest may be slow to leave.
        assert_eq!(other, Change { unplug: gone.clone(), plug: vec![(Port(2), card(&GPU))] });
        assert_eq!(there.change(&[]).unwrap(), Change { unplug: gone, plug: vec![] });
    }

    #[test]
    fn a_card_of_which_a_part_is_there_is_completed_in_its_port() {
        let half = ports(&[&[], &GPU[1..]]);
        assert_eq!(
            half.change(&[card(&GPU)]).unwrap(),
            Change { unplug: vec![], plug: vec![(Port(2), card(&GPU))] }
        );
    }

    #[test]
    fn hv11_more_cards_than_ports_are_refused_before_anything_is_done() {
        let there = ports(&[&[DISK]]);
        let error = there.change(&[card(&GPU), card(&[DISK])]).unwrap_err();
        insta::assert_snapshot!(error, @"it was started with 1 ports for cards, and is to have 2 cards; it gets them with `vmctl restart`");
        // One comes for another.
        assert_eq!(there.change(&[card(&GPU)]).unwrap().plug, [(Port(1), card(&GPU))]);
        let error = Ports::default().change(&[card(&GPU)]).unwrap_err();
        insta::assert_snapshot!(error, @"it was started by an earlier release of laird, which gave it no ports for cards; it gets them with `vmctl restart`");
    }

    #[test]
    fn ports_are_the_last_on_the_bus_in_their_order() {
        let slots = |ports: u16| (1..=ports).map(|port| Port(port).slot(ports.into())).collect::<Vec<_>>();
        assert_eq!(slots(4), [27, 28, 29, 30].map(Some));
        assert_eq!(slots(30), (1..=30).map(Some).collect::<Vec<_>>());
        assert_eq!(slots(31)[..2], [None, Some(1)]);
        assert_eq!((Port(2).slot(1), Port(u16::MAX).slot(0), Port(0).slot(30)), (None, None, None));
        let cards = [(Port(2), &card(&GPU)), (Port(3), &card(&[DISK]))];
        let places = places(5, cards);
        let told =
            places.iter().map(|(address, place)| format!("{address} is {}.{}", place.port, place.function));
        assert_eq!(
            told.collect::<Vec<_>>(),
            [
                "0000:01:00.0 is 0000:00:1c.0.0",
                "0000:02:00.0 is 0000:00:1b.0.0",
                "0000:02:00.1 is 0000:00:1b.0.1"
            ]
        );
    }

    #[test]
    fn ports_have_one_name_each() {
        assert_eq!("port12".parse(), Ok(Port(12)));
        for text in ["port", "port01", "port+1", "port-1", "port99999", "port1 ", "card1", "port1-x"] {
            assert_eq!(text.parse::<Port>(), Err(()), "{text}");
        }
    }

    /// Ports in each of which there is nothing, a part of a card of two functions, or all of it.
    fn some_ports() -> impl Strategy<Value = Ports> {
        let buses = Just((1..=5).collect::<Vec<u8>>()).prop_shuffle();
        (buses, prop::collection::vec(0_u8..4, 0..5)).prop_map(|(buses, parts)| {
            let there = |(bus, parts): (u8, u8)| {
                let functions = (0..2).filter(|function| parts >> function & 1 == 1);
                functions.map(|function| address(&format!("0000:0{bus}:00.{function}"))).collect()
            };
            Ports((1..).map(Port).zip(buses.into_iter().zip(parts).map(there)).collect())
        })
    }

    proptest! {
        /// Wherever somebody was cut short, the next one comes to what is wanted, and needs nothing more after that.
        #[test]
        fn whatever_was_there_all_that_is_wanted_is_there_in_the_end(mut there in some_ports(), wanted in prop::collection::btree_set(1_u8..4, 0..4)) {
            let wanted: Vec<_> = wanted.into_iter().map(|bus| card(&[&format!("0000:0{bus}:00.0"), &format!("0000:0{bus}:00.1")])).collect();
            let Ok(change) = there.change(&wanted) else {
                prop_assert!(there.0.len() < wanted.len());
                return Ok(());
            };
            for (port, functions) in &change.unplug {
                prop_assert_eq!(&std::mem::take(there.0.get_mut(port).unwrap()), functions);
            }
            for (port, card) in &change.plug {
                there.0.get_mut(port).unwrap().extend(&card.functions);
            }
            let all: BTreeSet<_> = wanted.iter().flat_map(|card| card.functions.clone()).collect();
            prop_assert_eq!(there.functions(), all);
            prop_assert_eq!(there.change(&wanted).unwrap(), Change::default());
        }
    }
}
