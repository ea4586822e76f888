// A JetStream work queue, its consumer and what a dispatcher wants to know of it, in one binary:
//
//	jobs put [--queue QUEUE] N [SECONDS|fail|kill]
//	jobs consumer [QUEUE ...]
//	jobs backlog [--watch] [QUEUE ...]
//	jobs results [QUEUE ...]
package main

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
)

// Where the server says that a job has been delivered as often as it may be.
const givenUp = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES"

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
	flags := flag.NewFlagSet(arguments[0], flag.ExitOnError)
	queue := flags.String("queue", "jobs", "of put: the queue")
	stay := flags.Bool("watch", false, "of backlog: stay, and print the numbers when they change")
	flags.Parse(arguments[1:])
	queues := flags.Args()
	if len(queues) == 0 {
		queues = []string{"jobs"}
	}
	url := fromEnvironment("NATS_URL", "nats://127.0.0.1:4222")
	connection, err := nats.Connect(url, nats.MaxReconnects(2), nats.ReconnectWait(time.Second))
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
		err = put(stream, *queue, flags.Args())
	case "consumer":
		err = consume(stream, queues)
	case "backlog":
		err = backlog(stream, queues, *stay)
	case "results":
		err = results(stream, queues)
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

// put puts jobs in, and makes the streams and the consumer where they are missing.
func put(stream nats.JetStreamContext, queue string, arguments []string) error {
	if len(arguments) == 0 {
		return errors.New("put [--queue QUEUE] N [SECONDS|fail|kill]")
	}
	count, err := strconv.Atoi(arguments[0])
	if err != nil {
		return err
	}
	what := "1"
	if len(arguments) > 1 {
		what = arguments[1]
	}
	if err := makeQueue(stream, queue); err != nil {
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
		if _, err := stream.Publish(queue, data); err != nil {
			return err
		}
	}
	return nil
}

func makeQueue(stream nats.JetStreamContext, queue string) error {
	ackWait, err := strconv.ParseFloat(fromEnvironment("NATS_ACK_WAIT", "30"), 64)
	if err != nil {
		return fmt.Errorf("NATS_ACK_WAIT: %w", err)
	}
	for _, config := range []nats.StreamConfig{
		{Name: queue, Subjects: []string{queue}, Retention: nats.WorkQueuePolicy},
		{Name: queue + "-results", Subjects: []string{queue + "-results"}},
		{Name: queue + "-failed", Subjects: []string{givenUp + "." + queue + ".workers"}},
	} {
		config := config
		if _, err := stream.AddStream(&config); err != nil {
			return err
		}
	}
	// Which also makes it where there is none.
	_, err = stream.UpdateConsumer(queue, &nats.ConsumerConfig{
		Durable:    "workers",
		AckPolicy:  nats.AckExplicitPolicy,
		AckWait:    time.Duration(ackWait * float64(time.Second)),
		MaxDeliver: 3,
	})
	return err
}

// backlog prints three numbers: jobs that wait, jobs in hand, jobs that are done or went aside. With
// stay it looks five times a second, and prints when they change.
func backlog(stream nats.JetStreamContext, queues []string, stay bool) error {
	var printed string
	var printedAt time.Time
	for {
		numbers, err := count(stream, queues)
		if err != nil {
			return err
		}
		if numbers != printed || time.Since(printedAt) >= 4*time.Second {
			if _, err := fmt.Println(numbers); err != nil {
				return err
			}
			printed, printedAt = numbers, time.Now()
		}
		if !stay {
			return nil
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// count asks the consumers. A stream goes on counting jobs that were given up.
func count(stream nats.JetStreamContext, queues []string) (string, error) {
	var waiting, inHand, done uint64
	for _, queue := range queues {
		workers, err := stream.ConsumerInfo(queue, "workers")
		if errors.Is(err, nats.ErrConsumerNotFound) || errors.Is(err, nats.ErrStreamNotFound) {
			continue // nothing was put in yet
		}
		if err != nil {
			return "", err
		}
		waiting += workers.NumPending
		inHand += uint64(workers.NumAckPending)
		done += workers.Delivered.Stream - uint64(workers.NumAckPending)
	}
	return fmt.Sprint(waiting, inHand, done), nil
}

// results prints what has become of the jobs: those that are done, those that went aside.
func results(stream nats.JetStreamContext, queues []string) error {
	for _, queue := range queues {
		err := read(stream, queue+"-results", func(data []byte) error {
			fmt.Println(string(data))
			return nil
		})
		if err != nil {
			return err
		}
		err = read(stream, queue+"-failed", func(data []byte) error {
			var note struct {
				Number uint64 `json:"stream_seq"`
			}
			if err := json.Unmarshal(data, &note); err != nil {
				return err
			}
			job, err := stream.GetMsg(queue, note.Number)
			if err != nil {
				return err
			}
			fmt.Printf("%s:%d aside: %s\n", queue, note.Number, job.Data)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
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
