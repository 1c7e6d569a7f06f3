import { z } from 'zod'

/** Device ids go into MQTT topics, file names and certificates: no dot (NATS refuses it, RabbitMQ rewrites it to a slash). Compared as bytes. */
const devicePattern = /^(?!e-)[a-z0-9][a-z0-9-]{0,63}$/
const namePattern = /^[a-z0-9][a-z0-9-]{0,63}$/

/** Whether it can be the name of a key, group, tenant or station. */
export const isName = (text: string): boolean => namePattern.test(text)

export const DeviceId = z.string().regex(devicePattern).brand<'DeviceId'>()
export type DeviceId = z.infer<typeof DeviceId>
/** The same without a result object, for what is asked thousands of times a second. */
export const isDeviceId = (text: string): text is DeviceId => devicePattern.test(text)

/** Name of a managed key; also its id. */
export const KeyId = z.string().regex(namePattern).brand<'KeyId'>()
export type KeyId = z.infer<typeof KeyId>

export const GroupId = z.string().regex(namePattern).brand<'GroupId'>()
export type GroupId = z.infer<typeof GroupId>

/** Who a broadcast is addressed to: the members in one shard of a group. */
export const GroupAddress = z
  .string()
  .regex(/^g[/][a-z0-9][a-z0-9-]{0,63}[/](0|[1-9][0-9]{0,4})$/)
  .brand<'GroupAddress'>()
export type GroupAddress = z.infer<typeof GroupAddress>

export const TenantId = z.string().regex(namePattern).brand<'TenantId'>()
export type TenantId = z.infer<typeof TenantId>

/** Version of a managed key: 1, 2, 3, …; only grows, never reused. */
export const Epoch = z.int().min(1).max(0xffff_ffff).brand<'Epoch'>()
export type Epoch = z.infer<typeof Epoch>

/** MQTT client id of a connection that has no identity yet: `e-` and 32 hexadecimal digits of randomness. */
export const EnrolmentId = z
  .string()
  .regex(/^e-[0-9a-f]{32}$/)
  .brand<'EnrolmentId'>()
export type EnrolmentId = z.infer<typeof EnrolmentId>

/** Base64url without padding of 16 random bytes, or any name of our own rows. */
export const RowId = z.string().regex(/^[A-Za-z0-9_/.-]{1,200}$/)
