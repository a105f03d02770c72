"""The queue's Lua scripts: each runs on the server as one step that nothing comes between.

They work on Redis 6.2 and later. Entries live in one stream with one consumer group. Consumers with
an "@" are no runners: "@returned" holds entries to hand out again, "@delivered" those whose episode
reached the learner. So every unfinished entry has exactly one holder or is unread.
"""

_PRELUDE = """
local stream, catalogue, meta, alive, arrived, dead, withdrawn = unpack(KEYS)
local GROUP = 'train'

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function fields(flat)
  local f = {}
  for i = 1, #flat, 2 do f[flat[i]] = flat[i + 1] end
  return f
end

local function entry(id)
  local found = redis.call('XRANGE', stream, id, id)[1]
  return found and fields(found[2])
end

local function pending_of(consumer, count)
  return redis.call('XPENDING', stream, GROUP, '-', '+', count, consumer)
end

local function move(id, consumer)
  redis.call('XCLAIM', stream, GROUP, consumer, 0, id, 'JUSTID')
end

local function handout(id, f)
  return {id, f.prompt, redis.call('HGET', catalogue, f.prompt) or ''}
end

local function drop(id)
  redis.call('XDEL', stream, id)
  return redis.call('XACK', stream, GROUP, id)
end

local function add(epoch, prompt, sample, failures)
  redis.call('XADD', stream, '*', 'epoch', epoch, 'prompt', prompt, 'sample', sample,
             'failures', failures, 'ordered', 0)
end

-- A prompt is a dead letter once, however many of its entries fail.
local function bury(id, f, failures, deliveries, reason)
  if redis.call('SADD', withdrawn, f.prompt) == 1 then
    redis.call('XADD', dead, '*', 'epoch', f.epoch, 'prompt', f.prompt, 'sample', f.sample,
               'failures', failures, 'deliveries', deliveries, 'reason', reason,
               'text', redis.call('HGET', catalogue, f.prompt) or '')
  end
  drop(id)
end
"""

# consumer, count -> {epoch, {{id, prompt id, text}, ...}}: returned entries first, then unread
# ones; those of prompts that have become dead letters since they were queued are dropped
TAKE = (
    _PRELUDE
    + """
local consumer, count = ARGV[1], tonumber(ARGV[2])
redis.call('ZADD', alive, now_ms(), consumer)
local out = {}
local function take(id, f)
  if redis.call('SISMEMBER', withdrawn, f.prompt) == 1 then drop(id) return end
  out[#out + 1] = handout(id, f)
end
for _, p in ipairs(pending_of('@returned', count)) do
  move(p[1], consumer)
  take(p[1], entry(p[1]))
end
while #out < count do
  local got = redis.call('XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', count - #out,
                         'STREAMS', stream, '>')
  if not got then break end
  for _, e in ipairs(got[1][2]) do take(e[1], fields(e[2])) end
end
return {redis.call('HGET', meta, 'epoch') or '-1', out}
"""
)

# consumer -> {{id, prompt id, text}, ...} it holds, oldest first; the delivery count stays
HELD = (
    _PRELUDE
    + """
redis.call('ZADD', alive, now_ms(), ARGV[1])
local out = {}
for _, p in ipairs(pending_of(ARGV[1], 1000000)) do
  out[#out + 1] = handout(p[1], entry(p[1]))
end
return out
"""
)

# consumer -> number given back, uncounted; the consumer is forgotten
RELEASE = (
    _PRELUDE
    + """
local pending = pending_of(ARGV[1], 1000000)
for _, p in ipairs(pending) do move(p[1], '@returned') end
redis.call('XGROUP', 'DELCONSUMER', stream, GROUP, ARGV[1])
redis.call('ZREM', alive, ARGV[1])
return #pending
"""
)

# silent_ms, max_deliveries -> number of entries taken from consumers silent for longer
RECLAIM = (
    _PRELUDE
    + """
local oldest, taken = now_ms() - tonumber(ARGV[1]), 0
for _, info in ipairs(redis.call('XINFO', 'CONSUMERS', stream, GROUP)) do
  local name = info[2]
  local beat = redis.call('ZSCORE', alive, name)
  if string.sub(name, 1, 1) ~= '@' and (not beat or tonumber(beat) < oldest) then
    for _, p in ipairs(pending_of(name, 1000000)) do
      local id, deliveries = p[1], p[4]
      taken = taken + 1
      if deliveries >= tonumber(ARGV[2]) then
        local f = entry(id)
        bury(id, f, f.failures, deliveries, deliveries .. ' consumers died holding it')
      else
        redis.call('XCLAIM', stream, GROUP, '@returned', 0, id)
      end
    end
    redis.call('XGROUP', 'DELCONSUMER', stream, GROUP, name)
  end
end
redis.call('ZREMRANGEBYSCORE', alive, '-inf', '(' .. oldest)
return taken
"""
)

# batch, ids... -> number newly delivered; those that reached the learner before, in another batch,
# are counted as duplicates
DELIVER = (
    _PRELUDE
    + """
local new, duplicates = 0, 0
local batch = ARGV[1]
for i = 2, #ARGV do
  local id = ARGV[i]
  local holder = redis.call('XPENDING', stream, GROUP, id, id, 1)[1]
  if not holder then
    duplicates = duplicates + 1
  else
    local f = entry(id)
    local episode = f.epoch .. ' ' .. f.sample .. ' ' .. f.prompt
    local before = redis.call('HGET', arrived, episode)
    if before and before ~= batch then duplicates = duplicates + 1 end
    redis.call('HSET', arrived, episode, batch)
    if holder[2] ~= '@delivered' then
      move(id, '@delivered')
      new = new + 1
    end
  end
end
redis.call('HINCRBY', meta, 'duplicates', duplicates)
return new
"""
)

# ids... -> number that were still there
ACK = (
    _PRELUDE
    + """
local acked = 0
for _, id in ipairs(ARGV) do
  local f = entry(id)
  if f then redis.call('HDEL', arrived, f.epoch .. ' ' .. f.sample .. ' ' .. f.prompt) end
  acked = acked + drop(id)
end
return acked
"""
)

# id, reason, max_failures -> 'again', 'dead', or 'gone' for an entry that nobody works on
FAIL = (
    _PRELUDE
    + """
local id, reason, max_failures = ARGV[1], ARGV[2], tonumber(ARGV[3])
local holder = redis.call('XPENDING', stream, GROUP, id, id, 1)[1]
if not holder or holder[2] == '@delivered' then return 'gone' end
local f = entry(id)
local failures = f.failures + 1
if failures >= max_failures then
  bury(id, f, failures, holder[4], reason)
  return 'dead'
end
add(f.epoch, f.prompt, f.sample, failures)
drop(id)
return 'again'
"""
)

# reason, prompt ids... -> number newly withdrawn: dead letters before they were ever handed out
WITHDRAW = (
    _PRELUDE
    + """
local new = 0
for i = 2, #ARGV do
  local prompt = ARGV[i]
  if redis.call('SADD', withdrawn, prompt) == 1 then
    new = new + 1
    redis.call('XADD', dead, '*', 'epoch', -1, 'prompt', prompt, 'sample', 0, 'failures', 0,
               'deliveries', 0, 'reason', ARGV[1],
               'text', redis.call('HGET', catalogue, prompt) or '')
  end
end
return new
"""
)

# -> number of dead letters put back at the end of the stream, their failures forgotten
REQUEUE_DEAD = (
    _PRELUDE
    + """
local letters = redis.call('XRANGE', dead, '-', '+')
for _, letter in ipairs(letters) do
  local f = fields(letter[2])
  if tonumber(f.epoch) >= 0 then add(f.epoch, f.prompt, f.sample, 0) end
end
redis.call('DEL', dead, withdrawn)
return #letters
"""
)
