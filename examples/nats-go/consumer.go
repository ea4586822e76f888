package main

import (
	"context"
	"errors"
	"log"
	"os/signal"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
)

// consume does jobs until none is left in these queues, or until SIGTERM.
func consume(stream nats.JetStreamContext, queues []string) error {
	stopping, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	for _, queue := range queues {
		if err := consumeOne(stream, queue, stopping); err != nil {
			return err
		}
	}
	return nil
}

// consumeOne does the jobs of one queue.
//
// A dead worker's job comes back after the consumer's ack_wait, to whoever asks then. So a consumer
// that finds no job stays that long while others have jobs in hand.
func consumeOne(stream nats.JetStreamContext, queue string, stopping context.Context) error {
	jobs, err := stream.PullSubscribe("", "", nats.Bind(queue, "workers"))
	if err != nil {
		return err
	}
	workers, err := jobs.ConsumerInfo()
	if err != nil {
		return err
	}
	ackWait := workers.Config.AckWait

	lastJob := time.Now()
	for stopping.Err() == nil {
		messages, err := jobs.Fetch(1, nats.MaxWait(time.Second))
		switch {
		case err == nil:
			if err := do(messages[0], stream, queue, ackWait, stopping); err != nil {
				return err
			}
			lastJob = time.Now()
		case errors.Is(err, nats.ErrTimeout):
			workers, err := jobs.ConsumerInfo()
			if err != nil {
				return err
			}
			if workers.NumAckPending == 0 || time.Since(lastJob) > ackWait+time.Second {
				return nil
			}
		default:
			return err
		}
	}
	return nil
}

type outcome struct {
	id, result string
	err        error
}

// do does one job, and tells the queue meanwhile that it is in good hands.
func do(
	message *nats.Msg,
	stream nats.JetStreamContext,
	queue string,
	ackWait time.Duration,
	stopping context.Context,
) error {
	done := make(chan outcome, 1)
	go func() {
		id, result, err := work(message.Data)
		done <- outcome{id, result, err}
	}()
	heartbeat := time.NewTicker(ackWait / 3)
	defer heartbeat.Stop()
	for {
		select {
		case <-heartbeat.C:
			if err := message.InProgress(); err != nil {
				log.Println("no heartbeat:", err)
			}
		case <-stopping.Done():
			return message.Nak()
		case job := <-done:
			if job.err != nil {
				log.Println("a try in vain:", job.err)
				return message.Nak()
			}
			// Two results with one id are one, should this job have to run again nevertheless.
			_, err := stream.Publish(queue+"-results", []byte(job.result), nats.MsgId(job.id))
			if err != nil {
				return err
			}
			return message.AckSync()
		}
	}
}
