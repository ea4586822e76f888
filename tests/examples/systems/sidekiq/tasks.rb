require "sidekiq"
require "sidekiq/api"

def note(line)
  File.open(ENV["LOG"], "a") { |log| log.puts(line) }
end

class Work
  include Sidekiq::Worker
  sidekiq_options queue: "jobs", retry: 2

  def perform(id, what)
    note("begin #{id}")
    Process.kill("KILL", Process.pid) if what == "kill"
    sleep(what.to_f)
    note("end #{id}")
  end
end

case ARGV[0]
when "put" then Work.perform_async(ARGV[1], ARGV[2])
when "count" then puts "#{Sidekiq::Queue.new('jobs').size} #{Sidekiq::Workers.new.size}"
end
