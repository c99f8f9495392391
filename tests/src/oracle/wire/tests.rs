use super::*;

fn segment(proto: u8, v6: bool) -> Segment {
    let addresses = if v6 { ["[fd00::1]:40000", "[fd00::2]:80"] } else { ["10.0.0.1:40000", "10.0.0.2:80"] };
    let [src, dst] = addresses.map(|text| text.parse().unwrap());
    Segment {
        src,
        dst,
        proto,
        flags: flag::ACK,
        seq: 1,
        ack: 2,
        ttl: 64,
        data: b"odd".to_vec(),
        summed: true,
    }
}

/// What the tests' packets become.
fn rewrite(v6: bool) -> Rewrite {
    let [src, dst] =
        if v6 { ["[fd00::9]:61000", "[fd00::a]:8080"] } else { ["9.9.9.9:61000", "8.8.8.8:8080"] };
    Rewrite { src: src.parse().unwrap(), dst: dst.parse().unwrap(), ttl_falls: true, quote: None }
}

const ALL: [(u8, bool); 6] =
    [(TCP, false), (UDP, false), (SCTP, false), (TCP, true), (UDP, true), (SCTP, true)];

#[test]
fn a_rewrite_gives_what_making_the_packet_anew_gives() {
    for (proto, v6) in ALL {
        let (before, rewrite) = (segment(proto, v6), rewrite(v6));
        let after = Segment { src: rewrite.src, dst: rewrite.dst, ttl: 63, ..before.clone() };
        let frame = before.frame();
        let headers = parse(&frame, false).unwrap();
        assert_eq!(headers.flaw, None);
        assert!(header_sum_is_right(&frame, &headers) && transport_sum_is_right(&frame, &headers));
        assert_eq!(rewritten(&frame, &headers, &rewrite), after.frame());
    }
}

#[test]
fn a_wrong_checksum_stays_wrong() {
    for (proto, v6) in ALL {
        let mut frame = segment(proto, v6).frame();
        *frame.last_mut().unwrap() ^= 1;
        let headers = parse(&frame, false).unwrap();
        let out = rewritten(&frame, &headers, &rewrite(v6));
        let headers = parse(&out, false).unwrap();
        assert!(header_sum_is_right(&out, &headers) && !transport_sum_is_right(&out, &headers));
    }
}

#[test]
fn the_check_value_of_the_crc_is_the_known_one() {
    assert_eq!(rewrite::crc32c(b"123456789"), 0xe306_9283);
}

#[test]
fn an_error_is_rewritten_with_what_it_quotes() {
    for (proto, v6) in ALL {
        for quoted in [48, 64, 200] {
            let (about, new) = (segment(proto, v6), rewrite(v6));
            let error = |about: &Segment, from: SocketAddr| {
                let frame = about.frame();
                let headers = parse(&frame, false).unwrap();
                error_about(&frame, &headers, from.ip(), [3, 1], 0, quoted)
            };
            let frame = error(&about, about.dst);
            let headers = parse(&frame, false).unwrap();
            assert_eq!((headers.flaw, headers.quote.unwrap().dst), (Some(Flaw::Protocol), about.dst));
            let whole =
                Rewrite { src: new.dst, dst: new.src, ttl_falls: false, quote: Some((new.src, new.dst)) };
            let out = rewritten(&frame, &headers, &whole);
            let after = parse(&out, false).unwrap();
            assert!(header_sum_is_right(&out, &after) && transport_sum_is_right(&out, &after));
            let mut wanted = error(&Segment { src: new.src, dst: new.dst, ..about.clone() }, new.dst);
            let crc = after.quote.unwrap().l4 + 8;
            if proto == SCTP && crc + 4 <= out.len() {
                // The quoted CRC32c stays as it is.
                wanted.splice(crc..crc + 4, out[crc..crc + 4].iter().copied());
                let sum = after.l4 + 2;
                wanted.splice(sum..sum + 2, out[sum..sum + 2].iter().copied());
            }
            assert_eq!(out, wanted);
        }
    }
}

#[test]
fn fragments_have_all_bytes_and_the_first_the_ports() {
    for (proto, v6) in ALL {
        let whole = Segment { data: vec![5; 100], ..segment(proto, v6) };
        let fragments = cut_up(&whole.frame(), 9, 48);
        let headers: Vec<_> = fragments.iter().map(|frame| parse(frame, false).unwrap()).collect();
        assert!(headers.len() > 2);
        for (number, (frame, headers)) in fragments.iter().zip(&headers).enumerate() {
            assert_eq!(headers.fragment, Some(Fragment { id: 9, first: number == 0 }));
            assert!(header_sum_is_right(frame, headers) && headers.end() == frame.len());
        }
        assert_eq!(headers[0].dst.port(), 80);
        assert_eq!((headers[1].dst.port(), headers[1].flaw), (0, Some(Flaw::Fragment)));
        let bytes = |(frame, headers): (&Vec<u8>, &Headers)| {
            let at = if v6 && headers.l4 == headers.l3 + 40 { headers.l4 + 8 } else { headers.l4 };
            frame[at..].to_vec()
        };
        let together: Vec<u8> = fragments.iter().zip(&headers).flat_map(bytes).collect();
        assert!(whole.frame().ends_with(&together) && together.len() > 100);
    }
}

#[test]
fn the_transport_header_is_found_behind_options_extensions_and_tags() {
    let v4 = behind(&segment(TCP, false).frame(), &[1; 8], &[]);
    let headers = parse(&v4, false).unwrap();
    assert_eq!((headers.flaw, headers.dst.port()), (None, 80));
    assert!(header_sum_is_right(&v4, &headers) && transport_sum_is_right(&v4, &headers));
    let option = || (60, vec![0, 1, 4, 0, 0, 0, 0]);
    for (count, flaw) in [(1, None), (4, None), (5, Some(Flaw::Extensions))] {
        let v6 = behind(&segment(UDP, true).frame(), &[], &vec![option(); count]);
        assert_eq!(parse(&v6, false).unwrap().flaw, flaw, "{count} headers");
    }
    let frame = tagged(&v4, 2);
    assert_eq!(parse(&frame, false), None);
    assert_eq!(parse(&frame, true).unwrap().dst.port(), 80);
    assert_eq!(parse(&tagged(&v4, 3), true), None);
}
