-- FILE_REMOVE: a file leaves the indexes. It works at maxmemory: its first command is no write that needs memory.
-- Stands alone, without the prelude.
--
-- KEYS: 1 the record, 2 files of the tenant, 3 all files, 4 expiry, 5 bytes
-- ARGV: 1 id, 2 tenant
-- returns 1, or 0: it was not there
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZREM', KEYS[4], ARGV[1])
local record = redis.call('GET', KEYS[1])
if not record then return 0 end
redis.call('DEL', KEYS[1])
if redis.call('HINCRBY', KEYS[5], ARGV[2], 0 - cjson.decode(record).bytes) <= 0 then   -- of 0, «-x» is «-0», no integer
  redis.call('HDEL', KEYS[5], ARGV[2])
end
return 1
