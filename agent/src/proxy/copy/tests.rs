use super::*;

fn pumps(turns: &Rc<Turns>, count: usize) -> Vec<Appetite> {
    let pump = || Appetite {
        turns: Rc::clone(turns),
        hungry: false,
    };
    std::iter::repeat_with(pump).take(count).collect()
}

/// The more of a pod's connections are busy, the shorter each one's turn, so that a round over
/// all of them stays as long as one turn alone, as far as a read can be shortened.
#[test]
fn a_pods_busy_connections_share_one_turn() {
    let turns = Rc::<Turns>::default();
    assert_eq!(turns.turn(), (ROUNDS, CHUNK), "alone");
    let whole = ROUNDS * CHUNK;
    for busy in 1..=1000 {
        let mut pumps = pumps(&turns, busy);
        pumps.iter_mut().for_each(|pump| pump.is(true));
        let (rounds, chunk) = turns.turn();
        assert!(rounds >= 1 && (LEAST_CHUNK..=CHUNK).contains(&chunk));
        assert!(
            busy * rounds * chunk <= whole || chunk == LEAST_CHUNK,
            "{busy} busy ones move {rounds} times {chunk}"
        );
        assert!(
            busy * rounds * chunk > whole / 2,
            "{busy} busy ones waste more than half of a turn"
        );
    }
    assert_eq!(turns.turn(), (ROUNDS, CHUNK), "all are gone");
}

#[test]
fn who_has_had_enough_or_has_ended_gives_its_part_back_once() {
    let turns = Rc::<Turns>::default();
    let mut pumps = pumps(&turns, 3);
    for _ in 0..2 {
        pumps.iter_mut().for_each(|pump| pump.is(true));
        assert_eq!(turns.hungry.get(), 3, "said twice it counts once");
    }
    pumps[0].is(false);
    pumps[0].is(false);
    assert_eq!(turns.hungry.get(), 2);
    drop(pumps);
    assert_eq!(turns.hungry.get(), 0);
}

#[test]
fn one_pods_turns_are_not_anothers() {
    let (greedy, modest) = (Rc::<Turns>::default(), Rc::<Turns>::default());
    let mut pumps = pumps(&greedy, 100);
    pumps.iter_mut().for_each(|pump| pump.is(true));
    assert!(greedy.turn().1 < CHUNK);
    assert_eq!(modest.turn(), (ROUNDS, CHUNK));
}
