package mux

import "encoding/binary"

const (
	// batchSize is what one write to the port carries. The virtio driver splits
	// larger writes at 32 KiB, so a batch is one trip through the queue.
	batchSize = 32768
	// smallestSlice is the room below which a batch is sent rather than filled
	// with a fragment of a larger write.
	smallestSlice = 1024
	controlRoom   = HeaderSize + 4 + 2*HeaderSize // WINDOW, CLOSE and RESET of one turn
)

// writeLoop sends what the streams have to say, one DATA frame per stream in
// turn. It is the only writer of the port.
func (s *Session) writeLoop() {
	batch := make([]byte, 0, batchSize)
	for {
		batch = s.nextBatch(batch[:0])
		if batch == nil {
			return
		}
		if len(batch) == 0 { // the streams in turn were dropped meanwhile
			continue
		}
		sealAll(batch)
		if _, err := s.port.Write(batch); err != nil {
			s.fail(err)
			return
		}
	}
}

// nextBatch waits for work and collects frames, checksums left out; nil when
// the session has ended. Taking copies, so that writers go on while the port
// is busy, and a HELLO that arrives meanwhile finds nothing half-written.
func (s *Session) nextBatch(batch []byte) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.hello == nil && len(s.resets) == 0 && len(s.ready) == 0 {
		if s.closed != nil {
			return nil
		}
		s.writeOK.Wait()
	}
	if s.closed != nil {
		return nil
	}
	if s.hello != nil {
		batch = appendHeader(batch, Hello, 0, EpochSize)
		batch = append(batch, s.hello...)
		s.hello = nil
	}
	for len(s.resets) > 0 && len(batch)+HeaderSize <= batchSize {
		batch = appendHeader(batch, Reset, s.resets[0], 0)
		s.resets = s.resets[1:]
	}
	return s.takeTurns(batch)
}

func (s *Session) takeTurns(batch []byte) []byte {
	for len(s.ready) > 0 {
		room := batchSize - len(batch) - controlRoom - HeaderSize
		stream := s.ready[0]
		if len(batch) > 0 && room < min(len(stream.out), smallestSlice) || room <= 0 {
			break
		}
		s.ready = s.ready[1:]
		stream.queued = false
		batch = stream.take(batch, room)
		stream.queue()
	}
	if len(s.ready) == 0 {
		s.ready = nil // let the backing array go
	}
	return batch
}

// take appends one turn of a stream: credit, one DATA frame of at most room
// bytes, and the end.
func (st *Stream) take(batch []byte, room int) []byte {
	if st.owesWindow() {
		batch = appendHeader(batch, Window, st.id, 4)
		batch = binary.BigEndian.AppendUint32(batch, uint32(st.owed))
		st.window += st.owed
		st.owed = 0
	}
	if n := min(int64(len(st.out)), st.credit, int64(room)); n > 0 {
		batch = appendHeader(batch, Data, st.id, int(n))
		batch = append(batch, st.out[:n]...)
		st.credit -= n
		st.out = st.out[n:]
		if len(st.out) == 0 {
			st.writeOK.Broadcast()
		}
	}
	if st.owesClose() {
		batch = appendHeader(batch, Close, st.id, 0)
		st.closeSent = true
		st.forgetIfDone()
	}
	if st.abort {
		batch = appendHeader(batch, Reset, st.id, 0)
		st.abort = false
		st.drop()
	}
	return batch
}

// sealAll fills in the checksums of a batch, outside the lock.
func sealAll(batch []byte) {
	for len(batch) > 0 {
		end := HeaderSize + int(binary.BigEndian.Uint32(batch[8:12]))
		seal(batch[:end])
		batch = batch[end:]
	}
}
