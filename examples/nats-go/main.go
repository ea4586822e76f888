// A JetStream work queue, its consumer and what a dispatcher wants to know of it, in one binary:
//
//	jobs put N [SECONDS|fail|kill] | consumer | backlog | results
package main

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"os"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
)

// Where the server says that a job has been delivered as often as it may be.
const givenUp = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.JOBS.workers"

func main() {
	log.SetFlags(0)
	log.SetPrefix("jobs: ")
	if err := run(os.Args[1:]); err != nil {
		log.Fatal(err)
	}
}

func run(arguments []string) error {
	if len(arguments) == 0 {
		return errors.New("which of put, consumer, backlog and results?")
	}
	connection, err := nats.Connect(fromEnvironment("NATS_URL", "nats://127.0.0.1:4222"))
	if err != nil {
		return err
	}
	defer connection.Close()
	stream, err := connection.JetStream()
	if err != nil {
		return err
	}
	switch arguments[0] {
	case "put":
		err = put(stream, arguments[1:])
	case "consumer":
		err = consume(stream)
	case "backlog":
		err = backlog(stream)
	case "results":
		err = results(stream)
	default:
		return fmt.Errorf("%q is none of put, consumer, backlog and results", arguments[0])
	}
	if err != nil {
		return err
	}
	return connection.Flush()
}

func fromEnvironment(name, otherwise string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return otherwise
}

// put puts jobs in, and makes the streams and the consumer where there are none.
func put(stream nats.JetStreamContext, arguments []string) error {
	if len(arguments) == 0 {
		return errors.New("put N [SECONDS|fail|kill]")
	}
	count, err := strconv.Atoi(arguments[0])
	if err != nil {
		return err
	}
	what := "1"
	if len(arguments) > 1 {
		what = arguments[1]
	}
	if err := makeQueue(stream); err != nil {
		return err
	}
	for i := 0; i < count; i++ {
		id := make([]byte, 16)
		if _, err := rand.Read(id); err != nil {
			return err
		}
		data, err := json.Marshal(job{ID: hex.EncodeToString(id), What: what})
		if err != nil {
			return err
		}
		if _, err := stream.Publish("jobs", data); err != nil {
			return err
		}
	}
	return nil
}

func makeQueue(stream nats.JetStreamContext) error {
	ackWait, err := strconv.ParseFloat(fromEnvironment("NATS_ACK_WAIT", "30"), 64)
	if err != nil {
		return fmt.Errorf("NATS_ACK_WAIT: %w", err)
	}
	for _, config := range []nats.StreamConfig{
		{Name: "JOBS", Subjects: []string{"jobs"}, Retention: nats.WorkQueuePolicy},
		{Name: "RESULTS", Subjects: []string{"results"}},
		{Name: "FAILED", Subjects: []string{givenUp}},
	} {
		config := config
		if _, err := stream.AddStream(&config); err != nil {
			return err
		}
	}
	// Which also makes it where there is none.
	_, err = stream.UpdateConsumer("JOBS", &nats.ConsumerConfig{
		Durable:    "workers",
		AckPolicy:  nats.AckExplicitPolicy,
		AckWait:    time.Duration(ackWait * float64(time.Second)),
		MaxDeliver: 3,
	})
	return err
}

// backlog prints how many jobs aren't done, those that wait and those in hand in one number: a dead
// worker's job comes back only when somebody asks for it. It is the consumer's own number; the
// stream goes on counting those that were given up.
func backlog(stream nats.JetStreamContext) error {
	workers, err := stream.ConsumerInfo("JOBS", "workers")
	if err != nil {
		return err
	}
	fmt.Println(workers.NumPending + uint64(workers.NumAckPending))
	return nil
}

// results prints what has become of the jobs: those that are done, those that went aside.
func results(stream nats.JetStreamContext) error {
	err := read(stream, "RESULTS", func(data []byte) error {
		fmt.Println(string(data))
		return nil
	})
	if err != nil {
		return err
	}
	return read(stream, "FAILED", func(data []byte) error {
		var note struct {
			Number uint64 `json:"stream_seq"`
		}
		if err := json.Unmarshal(data, &note); err != nil {
			return err
		}
		job, err := stream.GetMsg("JOBS", note.Number)
		if err != nil {
			return err
		}
		fmt.Printf("job %d aside: %s\n", note.Number, job.Data)
		return nil
	})
}

// read calls a function for all that a stream holds; it stays there.
func read(stream nats.JetStreamContext, name string, use func([]byte) error) error {
	info, err := stream.StreamInfo(name)
	if err != nil {
		return err
	}
	messages, err := stream.SubscribeSync("", nats.BindStream(name), nats.OrderedConsumer())
	if err != nil {
		return err
	}
	for i := uint64(0); i < info.State.Msgs; i++ {
		message, err := messages.NextMsg(5 * time.Second)
		if err != nil {
			return err
		}
		if err := use(message.Data); err != nil {
			return err
		}
	}
	return nil
}
